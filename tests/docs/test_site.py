"""The site: what its hook makes, and that it builds without warnings and broken links."""

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import method_pages
import pytest
import yaml
from config_commands import commands
from hooks import generated_pages
from links import linked_files, rewritten
from method_pages import method_index, method_page, methods_by_family, read_methods
from reference_pages import public_packages, reference_page

import lightning_kd
from lightning_kd.claims.verdict_table import verdict_table
from lightning_kd.cli.config_names import config_names
from lightning_kd.core.registry import family_packages
from lightning_kd.core.task import Task
from tests.conftest import ROOT

METHODS = {one.name: one for one in read_methods(ROOT)}
TABLE = "| method | paper | configs |\n| --- | --- | --- |\n"


def table(tmp_path, *rows):
    (tmp_path / "README.md").write_text("text\n\n" + TABLE + "".join(f"{row}\n" for row in rows) + "\nmore | text\n")
    return read_methods(tmp_path)


# -- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "page", "link", "expected"),
    [
        ("docs/distil.md", "distil.md", "../README.md", "index.md"),
        ("docs/distil.md", "distil.md", "../README.md#some-heading", "index.md"),
        ("docs/distil.md", "distil.md", "../configs/README.md#flat-minima", "configs.md#flat-minima"),
        ("docs/distil.md", "distil.md", "your_data.md#photos", "your_data.md#photos"),
        ("docs/distil.md", "distil.md", "quickstart.png", "quickstart.png"),
        ("docs/distil.md", "distil.md", "../CONTRIBUTING.md", "contributing.md"),
        ("docs/distil.md", "distil.md", "../pyproject.toml", "repository/pyproject.toml"),
        ("docs/distil.md", "distil.md", "https://arxiv.org/abs/1", "https://arxiv.org/abs/1"),
        ("docs/distil.md", "distil.md", "#here", "#here"),
        ("configs/README.md", "configs.md", "../docs/one_query.png", "one_query.png"),
        ("configs/README.md", "configs.md", "_overlay/smoke.yaml", "repository/configs/_overlay/smoke.yaml"),
        ("README.md", "methods/kd.md", "docs/methods/dkd.md", "dkd.md"),
        ("README.md", "methods/kd.md", "configs/README.md", "../configs.md"),
    ],
)
def test_links_are_rewritten_for_the_site(source, page, link, expected):
    assert rewritten(f"see [it]({link}), ![it]({link})", source, page, ROOT) == (
        f"see [it]({expected}), ![it]({expected})"
    )


def test_links_in_code_are_not_rewritten():
    text = "`a[0](../x.py)`\n\n```python\na[0](../x.py)\n```\n\n    [it](../README.md)\n"
    assert rewritten(text, "docs/distil.md", "distil.md", ROOT) == text.replace("../README.md", "index.md")
    assert linked_files("[a](../pyproject.toml) `[b](../Makefile)`", "docs/a.md", ROOT) == {"pyproject.toml"}


def test_a_link_to_a_missing_file_raises():
    with pytest.raises(ValueError, match=r"docs/distil.md links to ../nothing.md, and nothing.md is no file"):
        rewritten("[it](../nothing.md)", "docs/distil.md", "distil.md", ROOT)


# -- methods ---------------------------------------------------------------------------------------------------------


def test_a_row_of_the_methods_table_is_read(tmp_path):
    row = "| optimizer `SAM` | Foret, [2010.01412](https://a.org/2010.01412) | `flatness/sam_digits`, `sam_cifar10` |"
    (one,) = table(tmp_path, row)
    assert (one.name, one.page, one.family) == ("SAM", "sam.md", "flatness")
    assert one.configs == ("flatness/sam_digits", "flatness/sam_cifar10")
    assert one.objects == ("lightning_kd.flatness.sam.SAM",)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (["| `KD` | paper | `distillation/kd_digit` |"], "distillation/kd_digit, which there is not"),
        (["| `KD` | paper | |"], "no config in this row"),
        (["| `KD` | p | `distillation/kd_digits` |"] * 2, "two rows of README.md's table begin with KD"),
    ],
)
def test_rows_without_a_config_or_of_one_name_and_a_missing_table_raise(tmp_path, rows, reason):
    with pytest.raises(ValueError, match=reason):
        table(tmp_path, *rows)
    (tmp_path / "README.md").write_text("no table")
    with pytest.raises(ValueError, match="has no table that begins"):
        read_methods(tmp_path)


def test_each_method_class_has_a_row_in_readme():
    """Methods are the public classes that can be trained, without base classes."""
    named = {path.rpartition(".")[2] for one in METHODS.values() for path in one.objects}
    offered = {name for package in family_packages() for name in package.__all__}
    classes = {name for name in offered if is_method(getattr(lightning_kd, name))}
    assert classes <= named


def is_method(found):
    bases = ("Distillation", "FeatureDistillation", "LabelFreeDistillation")
    concrete = isinstance(found, type) and issubclass(found, Task) and not getattr(found, "__abstractmethods__", ())
    return concrete and not found.__name__.endswith("Task") and found.__name__ not in bases


def test_method_page_has_paper_docstring_verdicts_reference_and_config():
    page = method_page(METHODS["DHKD"], ROOT)
    assert page.startswith("# DHKD\n\nPaper: Yang et al., KDD 2025, [2411.08937](https://arxiv.org/abs/2411.08937).")
    assert "\n\nDual-head knowledge distillation (Yang et al." in page  # the class's docstring
    result = json.loads((ROOT / "docs/claims/dhkd.json").read_text())
    for row in verdict_table([result]).splitlines():
        assert row in page
    assert result["tried"] in page
    assert "::: lightning_kd.distillation.dhkd.DHKD\n" in page
    assert "[`binary_kl_norm_loss`][lightning_kd.distillation.dhkd.binary_kl_norm_loss]" in page
    shown = page.partition('??? note "distillation/dhkd_digits.yaml"')[2].partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(shown)["model"]["class_path"] == "lightning_kd.distillation.DHKD"


def test_commands_of_a_config_first_train_what_it_needs():
    def of(name, method):
        return [command.removeprefix("lightning-kd ") for command in commands(name, METHODS[method].configs)]

    teacher, student = (f"fit --config distillation/{name}_digits" for name in ("teacher", "student"))
    assert of("distillation/kd_digits", "KD") == [teacher, "fit --config distillation/kd_digits"]
    second = f"{teacher} --seed_everything 1 --run runs/teacher_digits_seed1"
    assert of("distillation/meal_v2_digits", "MEALV2") == [
        teacher,
        second,
        student,
        "fit --config distillation/meal_v2_digits",
    ]
    alone = "fit --config distillation/classification_cifar100 --model.network"
    assert of("distillation/kd_cifar100", "KD") == [
        f"{alone} resnet56 --run runs/teacher_resnet56",
        "fit --config distillation/kd_cifar100",
    ]
    assert of("distillation/meal_v2_cifar100", "MEALV2")[:-1] == [
        f"{alone} resnet56 --run runs/teacher_resnet56",
        f"{alone} resnet110 --run runs/teacher_resnet110",
        f"{alone} resnet20 --run runs/student_resnet20",
    ]
    own = "fit --config segmentation/baseline_arrays"  # there is a baseline_arrays of multi_label, too
    assert of("segmentation/rdd_arrays", "RDD") == [own, "fit --config segmentation/rdd_arrays"]
    assert of("active_learning/lfosa_digits", "LfOSA") == ["active --config active_learning/lfosa_digits"]
    assert of("active_learning/plain_digits", "lewis") == ["fit --config active_learning/plain_digits"]
    assert of("distillation/ssld_second_stage", "SSLD") == [
        teacher,
        "fit --config distillation/ssld_digits",
        "fit --config distillation/ssld_digits --config distillation/ssld_second_stage "
        "--model.student_weights runs/ssld_digits/student.pt",
    ]
    assert of("flatness/with_shift", "OptimumShiftingClassifier") == [
        "fit --config flatness/sgd_digits --config flatness/with_shift"
    ]


def test_commands_of_a_config_with_a_teacher_store_first_fill_it():
    photos = "--config distillation/fkd_folder --data.root photos"
    assert commands("distillation/fkd_folder", METHODS["FKD"].configs) == [
        "lightning-kd fit --config distillation/finetune_folder --data.root photos",
        f"lightning-kd teach {photos} --views 200 --compress marginal_smoothing_k5",
        f"lightning-kd fit {photos} --model.teacher_store runs/finetune_folder/checkpoints/best.store",
    ]
    assert commands("distillation/ferkd_digits", METHODS["FerKD"].configs)[1:] == [
        "lightning-kd teach --config distillation/ferkd_digits",
        "lightning-kd fit --config distillation/ferkd_digits --model.teacher_store runs/teacher_digits/network.store",
    ]


def test_method_page_begins_with_what_its_own_method_does():
    assert "Paper:" not in method_page(METHODS["PoolClassifier"], ROOT)
    assert "\n\nRandom, least confidence, margin" in method_page(METHODS["PoolClassifier"], ROOT)
    assert "\n\nThis is a reconstruction of Wang et al." in method_page(METHODS["DCFS"], ROOT)
    lskd = method_page(METHODS["LSKD"], ROOT)
    assert "\n\n`standardize`: standardize the logits of both networks first" in lskd
    assert "Knowledge distillation (Hinton" not in lskd  # KD's own page has it
    assert '\n\n`loss`: ``"ce"``, or ``"z"`` for ``z_loss``' in method_page(METHODS["Z-loss"], ROOT)


def test_method_page_of_an_unmeasured_claim_says_so(monkeypatch):
    monkeypatch.setattr(method_pages, "stored_results", lambda root: {})
    page = method_page(METHODS["SAM"], ROOT)
    assert "lightning-kd claim sam\n```\n\nNot measured yet." in page


def test_index_links_to_every_method_by_family():
    index = method_index(list(METHODS.values()))
    assert "| [LSKD](docs/methods/lskd.md): `KD` and `DKD` with" in index
    assert all(f"](docs/methods/{one.page})" in index for one in METHODS.values())
    families = methods_by_family(list(METHODS.values()))
    assert sorted(one.name for members in families.values() for one in members) == sorted(METHODS)
    assert [one.name for one in families["Flatness"]][:2] == ["OptimumShiftingClassifier", "SAM"]


# -- the reference ---------------------------------------------------------------------------------------------------


def test_reference_has_every_public_name_of_each_package():
    assert {"core", "data", "distillation", "nets"} <= {*public_packages()}
    assert "::: lightning_kd.distillation.dkd.dkd_loss\n" in reference_page("distillation")
    assert "::: lightning_kd.pool.pool_record.UNKNOWN\n" in reference_page("pool")  # a constant knows no module
    for name in public_packages():
        offered = __import__(f"lightning_kd.{name}", fromlist=["__all__"]).__all__
        assert reference_page(name).count("\n::: ") == len(offered)


# -- the whole site --------------------------------------------------------------------------------------------------


class LinksAndAnchors(HTMLParser):
    """The targets of a page's links and pictures, and the anchors in it."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given[key] for key in ("id", "name") if given.get(key)}
        self.links += [given[key] for key in ("href", "src") if given.get(key)]


@pytest.mark.slow
def test_site_builds_without_broken_links_and_font_or_cdn_hosts(tmp_path):
    words = [sys.executable, "-m", "mkdocs", "--quiet", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path: LinksAndAnchors(path.read_text()) for path in (tmp_path / "site").rglob("*.html")}
    for one in METHODS.values():
        assert (tmp_path / f"site/methods/{one.page}").with_suffix(".html") in pages
    assert {(tmp_path / "site" / uri).with_suffix(".html") for uri in generated_pages()} <= {*pages}
    broken, outside = [], set()
    for path, targets in pages.items():
        for link in targets.links if path.name != "404.html" else ():  # whose links are from the root
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                outside.add(parts.netloc)
                continue
            place = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            if not place.exists() or (
                place in pages and parts.fragment and unquote(parts.fragment) not in pages[place].ids
            ):
                broken.append(f"{path.relative_to(tmp_path / 'site')}: {link}")
    assert not broken
    assert not {place for place in outside if "font" in place or "cdn" in place or "unpkg" in place}


def test_method_pages_show_more_than_100_configs_and_all_exist():
    """Those on no page are parts, teachers and settings."""
    shown = {name for one in METHODS.values() for name in one.configs}
    assert len(shown & {*config_names()}) == len(shown) > 100
