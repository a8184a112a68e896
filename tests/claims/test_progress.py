"""The remaining time of a claim, estimated from its finished runs."""

import pytest

from lightning_kd.claims.progress import Progress, in_words, seconds_left


def test_remaining_time_is_estimated_from_runs_of_the_same_setting():
    spent = {"teacher": [10.0, 20.0], "student": [3.0]}
    assert seconds_left(["teacher", "student", "student"], spent, 1, 60) == pytest.approx(15 + 3 + 3)
    assert seconds_left(["teacher", "student", "student"], spent, 2, 60) == pytest.approx(10.5)
    assert seconds_left(["other"], spent, 1, 60) == pytest.approx(11)  # the mean of all
    assert seconds_left(["other", "other"], {}, 1, 60) == pytest.approx(120)  # no run has finished: the guess of 60 s
    assert (in_words(89.4), in_words(150.4)) == ("89 s left", "3 min left")


def test_each_finished_run_is_printed(capsys):
    with Progress("mine", ["a", "b"], 1, 5) as bar:
        bar.ended("a", 2.0, "a_seed0: 2 s")
        bar.ended("b", 2.0, "b_seed0: 2 s")
    err = capsys.readouterr().err
    assert "a_seed0: 2 s\nb_seed0: 2 s\n" in err
    assert "2/2 0 s left" in err
