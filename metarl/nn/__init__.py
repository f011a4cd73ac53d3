"""Networks and numerics: pure functions and modules that know neither agents nor environments."""
