"""``lightning-kd compare``: how runs are grouped and labelled, and the tables and pictures made of them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.image import imread

from lightning_kd.compare import compare_runs, direction, main, to_csv, to_markdown

DHKD = "lightning_kd.distillation.DHKD"
Rows = list[dict[str, Any]]


def make_run(
    path: Path,
    seed: int | None,
    rows: Rows | None = None,
    *,
    method: str = DHKD,
    outcome: str | None = "finished",
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **init_args: Any,
) -> Path:
    """A run folder as the command leaves it."""
    rows = rows if rows is not None else epochs(0.5, 0.6)
    (path / "checkpoints").mkdir(parents=True)
    config = {
        "seed_everything": seed,
        "run": str(path),
        "overwrite": seed == 1,
        "ckpt_path": None,
        "trainer": {
            "max_epochs": 2,
            "default_root_dir": str(path),
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(path)}},
            "callbacks": [{"class_path": "Saver", "init_args": {"dirpath": f"{path}/checkpoints"}}],
            **(trainer or {}),
        },
        "model": {"class_path": method, "init_args": init_args},
        "data": {"class_path": "lightning_kd.data.Digits", "init_args": {"batch_size": 64, **(data or {})}},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    if outcome is not None:
        (path / "run.json").write_text(json.dumps({"verb": "fit", "outcome": outcome, "history": []}))
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("epoch", "step")))
    with (path / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "step", *names], restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def epochs(*values: float, test: float | None = None, metric: str = "val/acc") -> Rows:
    rows: Rows = [{"epoch": i, "step": 10 * i + 9, metric: value} for i, value in enumerate(values)]
    return rows if test is None else [*rows, {"epoch": len(values), "step": 10 * len(values), "test/acc": test}]


def labels(*runs: Path) -> list[str]:
    return [group.label for group in compare_runs(runs)]


def test_mean_std_last_and_best_equal_values_by_hand(tmp_path: Path) -> None:
    make_run(tmp_path / "a_seed0", 0, epochs(0.5, 0.9, 0.7))
    make_run(tmp_path / "a_seed1", 1, epochs(0.6, 0.8, 0.8))
    make_run(tmp_path / "a_seed2", 2, epochs(0.95, 0.2, 0.9))
    [group] = compare_runs([tmp_path])
    s = group.metrics["val/acc"]
    assert (group.label, group.seeds, s.n, s.last) == ("a", ["0", "1", "2"], 3, [0.7, 0.8, 0.9])
    assert s.mean == pytest.approx(0.8)
    assert s.std == pytest.approx(0.1)  # sqrt((0.01 + 0 + 0.01) / 2)
    assert s.best == pytest.approx((0.9 + 0.8 + 0.95) / 3)
    assert s.best_std == pytest.approx(((0.0166667**2 + 0.0833333**2 + 0.0666667**2) / 2) ** 0.5, rel=1e-5)
    assert group.notes == []


def test_nan_stays_in_the_mean_and_is_noted(tmp_path: Path) -> None:
    make_run(tmp_path / "a_0", 0, epochs(0.5, 0.6))
    make_run(tmp_path / "a_1", 1, epochs(0.4, float("nan")))
    [group] = compare_runs([tmp_path])
    assert group.metrics["val/acc"].best == pytest.approx(0.5)
    assert group.notes == ["val/acc is not finite: a_1"]
    assert ",val/acc,2,nan,nan,0.5," in to_csv([group])


def test_default_metrics_and_errors_for_unknown_or_missing_ones(tmp_path: Path) -> None:
    both = make_run(tmp_path / "both", 0, epochs(0.5, test=0.4))
    val = make_run(tmp_path / "val", 0, epochs(0.5), heads=2)
    loss = make_run(tmp_path / "loss", 0, epochs(0.5, metric="val/loss"), heads=3)
    test = make_run(tmp_path / "test", 0, [{"epoch": 0, "test/auc": 0.5}], heads=4)
    train = make_run(tmp_path / "train", 0, [{"epoch": 0, "train/loss": 0.5}], heads=5)
    empty = make_run(tmp_path / "empty", 0, [], heads=6)

    def chosen(*runs: Path) -> list[str]:
        return list(compare_runs(runs)[0].metrics)

    assert chosen(val, both) == ["test/acc", "val/acc"]
    assert chosen(val, loss) == ["val/acc"]
    assert chosen(test, loss) == ["val/loss"]
    assert chosen(test) == ["test/auc"]
    with pytest.raises(ValueError, match="recorded are train/loss; name one with --metric"):
        chosen(train)
    with pytest.raises(ValueError, match="no run has recorded any metric yet"):
        chosen(empty)
    with pytest.raises(ValueError, match="--metric val/accc: no run has it; recorded are val/acc, test/acc"):
        compare_runs([both], ["val/accc"])


def test_runs_that_differ_only_in_seed_are_one_group(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"a_seed{s}", s, heads=2, data={"source": {"seed": s, "noise": 0.2}}) for s in (10, 9)]
    other = [
        make_run(tmp_path / "b_seed0", 0, heads=2, data={"source": {"seed": 0, "noise": 0.4}}),
        make_run(tmp_path / "c_seed0", 0, heads=3, data={"source": {"seed": 0, "noise": 0.2}}),
        make_run(
            tmp_path / "d_seed0", 0, heads=2, data={"source": {"seed": 0, "noise": 0.2}}, trainer={"max_epochs": 9}
        ),
    ]
    groups = compare_runs([*runs, *other])
    assert [group.label for group in groups] == ["a", "b", "c", "d"]
    assert [run.path for run in groups[0].runs] == [runs[1], runs[0]]  # sorted by seed


@pytest.mark.parametrize("file", ["checkpoints/best.ckpt", "network.pt"])
@pytest.mark.parametrize("relative", [False, True])
def test_students_whose_teachers_differ_in_seed_alone_are_one_group(tmp_path: Path, file: str, relative: bool) -> None:
    students = []
    for seed in (0, 1, 2):
        teacher = make_run(tmp_path / "runs" / f"teacher_seed{seed}", seed, method="x.Supervised", depth=40)
        weights = str(Path("runs") / teacher.name / file) if relative else str(teacher / file)
        students.append(make_run(tmp_path / "runs" / f"student_seed{seed}", seed, teacher_weights=weights))
    assert labels(*students) == ["student"]

    other = make_run(tmp_path / "runs" / "big_seed0", 0, method="x.Supervised", depth=110)
    students.append(make_run(tmp_path / "runs" / "other_seed3", 3, teacher_weights=str(other / file)))
    students.append(make_run(tmp_path / "runs" / "file_seed4", 4, teacher_weights=str(tmp_path / "t" / "t.pt")))
    students.append(make_run(tmp_path / "runs" / "none_seed5", 5, teacher_weights=None))
    assert labels(*students) == ["student", "other", "file", "none"]


def test_students_of_two_teachers_that_differ_in_seed_alone_are_one_group(tmp_path: Path) -> None:
    students = []
    for seed in (0, 1):
        both = [make_run(tmp_path / f"{name}_seed{seed}", seed, depth=depth) for name, depth in (("a", 20), ("b", 40))]
        weights = [str(teacher / "network.pt") for teacher in both]
        students.append(make_run(tmp_path / f"student_seed{seed}", seed, teacher_weights=weights))
    students.append(make_run(tmp_path / "other_seed0", 0, teacher_weights=[weights[1], weights[0]]))
    students.append(make_run(tmp_path / "one_seed0", 0, teacher_weights=["random", None]))
    assert labels(*students) == ["student", "other", "one"]


def test_chains_of_teachers_are_grouped_and_a_circle_ends(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / f"a_seed{seed}", seed, teacher_weights=f"{tmp_path}/b_seed{seed}/network.pt")
        make_run(tmp_path / f"b_seed{seed}", seed, teacher_weights=f"{tmp_path}/c_seed{seed}/network.pt")
        make_run(tmp_path / f"c_seed{seed}", seed)
    assert labels(tmp_path) == ["a", "b", "c"]
    loop = make_run(tmp_path / "loop", 0, teacher_weights=f"{tmp_path}/loop/network.pt")
    assert labels(loop) == ["loop"]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("student_seed{}", "student"),
        ("student-s{}", "student"),
        ("student_{}", "student"),
        ("student/{}", "student"),
        ("student/seed{}", "student"),
        ("student/seed_{}", "student"),
        ("resnet56-Seed-{}", "resnet56"),
        ("resnet_56_{}", "resnet_56"),
    ],
)
def test_label_is_the_folder_name_without_its_seed(tmp_path: Path, name: str, label: str) -> None:
    assert labels(*[make_run(tmp_path / name.format(seed), seed) for seed in (0, 1)]) == [label]


def test_label_is_method_and_settings_where_folder_names_differ(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "monday", 0, heads=2, lr=0.1),
        make_run(tmp_path / "tuesday", 1, heads=2, lr=0.1),
        make_run(tmp_path / "noon", 0, heads=1, lr=0.1),
        make_run(tmp_path / "night", 1, heads=1, lr=0.1),
        make_run(tmp_path / "x", 0, method="y.KD"),
        make_run(tmp_path / "z", 1, method="y.KD"),
    ]
    assert labels(*runs) == ["DHKD heads=2", "DHKD heads=1", "KD"]


def test_groups_of_equal_name_are_labelled_with_settings_that_differ(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a" / "student_seed0", 0, optimizer={"class_path": "torch.optim.SGD"}, milestones=[1, 2]),
        make_run(tmp_path / "b" / "student_seed0", 0, optimizer={"class_path": "torch.optim.Adam"}, milestones=[1, 3]),
        make_run(tmp_path / "c" / "student_seed0", 0, optimizer={"class_path": "torch.optim.SGD"}, milestones=[1, 3]),
    ]
    assert labels(*runs) == [
        "student optimizer=SGD milestones=[1,2]",
        "student optimizer=Adam milestones=[1,3]",
        "student optimizer=SGD milestones=[1,3]",
    ]


def test_label_has_three_settings_or_as_many_as_tell_groups_apart(tmp_path: Path) -> None:
    many = {f"k{i}": 0 for i in range(9)}
    a = make_run(tmp_path / "a" / "s_seed0", 0, **many)
    b = make_run(tmp_path / "b" / "s_seed0", 0, **dict.fromkeys(many, 1.5))
    assert labels(a, b) == ["s k0=0 k1=0 k2=0", "s k0=1.5 k1=1.5 k2=1.5"]
    runs = [make_run(tmp_path / str(i) / "s_seed0", 0, **{**many, f"k{i}": 1}) for i in range(5)]
    assert len(set(labels(*runs))) == 5


def test_an_incomplete_run_folder_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a_seed0", 0)
    (make_run(tmp_path / "a_seed1", 1) / "metrics.csv").unlink()
    (tmp_path / "notes").mkdir()
    main([str(tmp_path)])
    line = f"left out: {tmp_path / 'a_seed1'} (no metrics.csv)"
    assert line in capsys.readouterr().out
    assert f"- {line}\n" in (tmp_path / "compare" / "compare.md").read_text()
    (tmp_path / "a_seed0" / "config.yaml").unlink()
    with pytest.raises(
        ValueError, match=r"No run to compare: left out: .*a_seed0 \(no config.yaml\); left out: .*a_seed1"
    ):
        main([str(tmp_path)])


def test_last_and_best_with_blank_cells_short_rows_and_step_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 0)
    (run / "metrics.csv").write_text(
        "epoch,step,val/acc,train/loss,test/acc,val/gap\n"
        "0,4,,2.0,,\n0,9,0.8,,,0.5\n1,14,,1.0,,\n1,19,,0.5,,\n1,19,0.3,,,0.1\n2,24,,0.75,,\n3,30,,,0.35,\n0,0,,,0.15"
    )
    [group] = compare_runs([run], ["val/acc", "train/loss", "test/acc", "val/gap"])
    last_and_best = {name: (s.last, s.best, s.std) for name, s in group.metrics.items()}
    assert last_and_best == {
        "val/acc": ([0.3], 0.8, None),
        "train/loss": ([0.75], 0.5, None),  # the last row of an epoch counts, and the smallest loss is the best
        "test/acc": ([0.15], None, None),  # the last one recorded; a test metric has no best epoch
        "val/gap": ([0.1], None, None),  # its name does not say whether more is better
    }
    assert group.runs[0].epochs == 3  # rows of a test count as no epoch


@pytest.mark.parametrize(
    ("sign", "names"),
    [
        (1, "val/acc val/acc5 test/top1_accuracy val/auc val/f1 val/acc/dataloader_idx_0"),
        (-1, "val/loss val/ece train/nll_loss val/acc_error val/loss2"),
        (0, "val/gap train/accumulated lr-SGD val/blossom"),
    ],
)
def test_direction_of_a_metric_follows_words_in_its_name(sign: int, names: str) -> None:
    assert {name: direction(name) for name in names.split()} == dict.fromkeys(names.split(), sign)


def test_repeated_seeds_unequal_epochs_and_missing_metrics_are_noted(tmp_path: Path) -> None:
    make_run(tmp_path / "a" / "0", 0, epochs(0.5, 0.6, test=0.5))
    make_run(tmp_path / "a" / "1", 1, epochs(0.5))
    make_run(tmp_path / "a" / "again_1", 1, epochs(0.5), data={"seed": 7})  # other data: an independent repeat
    make_run(tmp_path / "a" / "copy", 0, epochs(0.5))
    [group] = compare_runs([tmp_path / "a", tmp_path / "a" / "0"])  # named twice, counted once
    assert group.seeds == ["0", "0", "1", "1"]
    assert group.notes == [
        "warning: seed 0 occurs more than once (a/0, copy); these are not independent repeats",
        "the number of epochs differs: a/0 2, copy 1, a/1 1, again_1 1",
        "no test/acc: copy, a/1, again_1",
    ]


def test_a_run_is_finished_if_its_last_fit_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 0)
    fits = [{"verb": "fit", "outcome": "failed"}, {"verb": "fit", "outcome": "finished"}]
    (run / "run.json").write_text(json.dumps({"verb": "test", "outcome": "failed", "history": fits}))
    assert "unfinished" not in to_markdown(compare_runs([run]))


def test_unfinished_runs_are_counted_and_marked(tmp_path: Path) -> None:
    for seed, outcome in enumerate(["finished", "failed", "running", None, "interrupted"]):
        run = make_run(tmp_path / f"a_seed{seed}", seed, outcome=outcome)
    earlier = json.loads((run / "run.json").read_text())  # a test that finished does not finish the fit
    (run / "run.json").write_text(json.dumps({"verb": "test", "outcome": "finished", "history": [earlier]}))
    groups = compare_runs([tmp_path])
    assert groups[0].metrics["val/acc"].n == 5
    text = to_markdown(groups)
    assert "| 0, 1*, 2*, 3*, 4* |" in text
    names = "a_seed1 (failed), a_seed2 (running), a_seed3 (no record of a fit), a_seed4 (interrupted)"
    assert f"- unfinished (marked *): {names}\n" in text


def test_printed_and_written_tables_equal_the_expected_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "20")  # a narrow terminal cuts nothing
    runs = Path("runs")
    make_run(runs / "kd_seed0", 0, epochs(0.5, 0.8, test=0.7), heads=2)
    make_run(runs / "kd_seed1", 1, epochs(0.9, 0.6, test=0.8), heads=2, outcome="running")
    make_run(runs / "plain|x", 0, epochs(0.25))
    main(["runs"])
    assert (runs / "compare" / "compare.csv").read_text() == (
        "group,metric,n,mean,std,best,best_std,last,seeds,epochs,runs,unfinished\n"
        "kd,test/acc,2,0.75,0.07071068,,,0.7;0.8,0;1,2;2,runs/kd_seed0;runs/kd_seed1,runs/kd_seed1\n"
        "plain|x,test/acc,0,,,,,,0,1,runs/plain|x,\n"
        "kd,val/acc,2,0.7,0.1414214,0.85,0.07071068,0.8;0.6,0;1,2;2,runs/kd_seed0;runs/kd_seed1,runs/kd_seed1\n"
        "plain|x,val/acc,1,0.25,,0.25,,0.25,0,1,runs/plain|x,\n"
    )
    text = """### test/acc

| run      |   n | mean % | std % | seeds | last %       |
| -------- | --: | -----: | ----: | ----- | ------------ |
| kd       |   2 |  75.00 |  7.07 | 0, 1* | 70.00, 80.00 |
| plain\\|x |   0 |        |       | 0     | -            |

### val/acc

| run      |   n | mean % | std % | best % | best std % | seeds | last %       |
| -------- | --: | -----: | ----: | -----: | ---------: | ----- | ------------ |
| kd       |   2 |  70.00 | 14.14 |  85.00 |       7.07 | 0, 1* | 80.00, 60.00 |
| plain\\|x |   1 |  25.00 |       |  25.00 |            | 0     | 25.00        |

mean and std: over runs of the value at the last epoch (sample standard deviation). best: the same over each run's """
    text += "best epoch.\n\n- unfinished (marked *): kd_seed1 (running)\n- plain|x: no test/acc: plain|x\n"
    assert (runs / "compare" / "compare.md").read_text() == text
    written = "".join(f"runs/compare/compare.{suffix}\n" for suffix in ("csv", "md", "png"))
    assert capsys.readouterr().out == f"{text}\n{written}"
    main(["runs", "--output", "deep/out", "--metric", "val/acc"])  # runs/compare is not taken for a run
    assert (tmp_path / "deep" / "out" / "compare.png").is_file()


def test_metrics_that_are_not_fractions_are_not_shown_in_percent(tmp_path: Path) -> None:
    assert " 0.5000 |" in to_markdown(compare_runs([make_run(tmp_path / "a", 0, epochs(0.5, metric="val/loss"))]))
    assert " 71.5000 |" in to_markdown(compare_runs([make_run(tmp_path / "b", 0, epochs(0.9, 71.5))]))


@pytest.mark.parametrize("kind", ["curves", "values", "many", "one epoch", "odd names", "nan"])
def test_picture_shows_the_first_group(tmp_path: Path, kind: str) -> None:
    for i in range(12 if kind == "many" else 2):
        for seed in (0, 1):
            values = [0.5 + 0.02 * e + 0.05 * i + 0.03 * seed for e in range(1 if kind == "one epoch" else 5 - seed)]
            rows = epochs(*values, test=values[-1])
            if kind == "nan":
                rows[-2]["val/acc"] = float("nan")
            make_run(tmp_path / (f"_$x_{i}$y" if kind == "odd names" else f"g{i}") / str(seed), seed, rows, heads=i)
    main([*map(str, sorted(tmp_path.iterdir())), *(["--metric", "test/acc"] if kind == "values" else [])])
    picture = imread(tmp_path / "compare" / "compare.png")
    assert picture.shape[1] == 960
    blue = abs(picture[..., :3] - [0.0, 0x72 / 255, 0xB2 / 255]).max(axis=-1) < 0.02
    assert blue.sum() > 30  # the first group is drawn


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", None, r"a has no config\.yaml, so it cannot be compared"),
        ("metrics.csv", None, r"a has no metrics\.csv, so it cannot be compared"),
        ("config.yaml", "a: [1", r"config\.yaml is damaged \(.*\); leave"),
        ("config.yaml", "", r"config\.yaml is damaged \(it holds no settings\)"),
        ("run.json", '{"verb": ', r"run\.json is damaged"),
        ("metrics.csv", "epoch,step,val/acc\n0,1,0.5\n1,2,x\n", r"metrics\.csv is damaged in line 3 \(.*'x'\)"),
        ("metrics.csv", "epoch,step,val/acc\n0,1,0.5,7\n", r"metrics\.csv is damaged in line 2"),
    ],
)
def test_a_missing_or_damaged_file_raises_one_sentence(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    run = make_run(tmp_path / "a", 0)
    (run / name).unlink() if content is None else (run / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        main([str(run)])
    assert "\n" not in str(error.value)


def test_wrong_arguments_raise(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 0)
    (tmp_path / "empty").mkdir()
    for argv, message in (
        ([], "arguments are required: RUN"),
        ([str(run), "--best"], "unrecognized arguments: --best"),
        ([str(tmp_path / "nothing")], "nothing is not a folder"),
        ([str(tmp_path / "empty")], "empty is not a run folder"),
        ([str(run), "--output", str(run / "config.yaml")], r"config\.yaml cannot be written"),
    ):
        with pytest.raises(ValueError, match=message):
            main(argv)


def test_import_of_compare_loads_no_torch_lightning_or_matplotlib() -> None:
    code = "import sys, lightning_kd.compare; print({'torch', 'lightning', 'matplotlib'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
