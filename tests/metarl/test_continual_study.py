"""Forgetting shown and cured, in small: two opposite families of goals, one seed."""

import pytest

from scripts import continual_study


@pytest.mark.slow
def test_fine_tuning_forgets_and_both_methods_do_not(tmp_path, capsys):
    arms = ["fine_tuning", "ewc", "replay"]
    found = continual_study.main(["quick", "--arms", *arms, "--seeds", "0", "--jobs", "1", "--out", str(tmp_path)])
    lost = {arm: run["lost"] for arm, (run,) in found.items()}  # by the first family
    assert lost["fine_tuning"] > 0.5
    assert lost["ewc"] < 0.2 and lost["replay"] < 0.2
    assert found["replay"][0]["last"] > 0.6  # not by having learned nothing
    assert "| ewc |" in capsys.readouterr().out
    for name in ("quick/study.md", "quick/study.png", "quick/study.json"):
        assert (tmp_path / name).stat().st_size > 0
    continual_study.main(["quick", "--arms", *arms, "--seeds", "0", "--jobs", "1", "--out", str(tmp_path)])
    assert "metarl train" not in capsys.readouterr().out  # what has finished is not repeated
