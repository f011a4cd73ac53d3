"""Modules under the names that they had at the top of the package: `metarl.baseline`, `metarl.play`, `metarl.sb3`."""
