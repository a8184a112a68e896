"""The README's table of verdicts."""

import json

import pytest

from lightning_kd.claims.verdict_table import BEGIN, END, main, verdict_table, with_table
from tests.conftest import ROOT

RESULTS = [json.loads(path.read_text()) for path in sorted((ROOT / "docs/claims").glob("*.json"))]


def test_readme_table_matches_the_stored_results():
    readme = (ROOT / "README.md").read_text()
    assert with_table(readme, verdict_table(RESULTS)) == readme, "run make verdicts"
    for result in RESULTS:
        assert f"`{result['name']}`" in readme


def test_stored_results_match_the_claim_files():
    from lightning_kd.claims.claim_file import read_claim

    assert RESULTS
    for result in RESULTS:
        claim = read_claim(ROOT / f"configs/claims/{result['name']}.yaml")
        stored = [result[key] for key in ("claim", "metric", "source", "tried")]
        assert stored == [claim.sentence, claim.metric, claim.source, claim.tried]
        assert [one["expected"] for one in result["expected"]] == list(map(str, claim.expected))
        for setting, found in result["settings"].items():
            assert tuple(found["commands"]) == claim.settings[setting]
            assert len(found["values"]) == len(result["seeds"]) == len(claim.seeds)


def test_quickstart_numbers_match_the_results_of_its_claim():
    (result,) = [result for result in RESULTS if result["name"] == "quickstart"]
    readme = (ROOT / "README.md").read_text()
    for found in result["settings"].values():
        assert f" | {len(found['values'])} | {100 * found['mean']:.2f} | {100 * found['std']:.2f} |\n" in readme


def test_table_has_a_row_for_each_expectation(tmp_path):
    one = {"expected": "a > b", "difference": 0.0123, "interval": [-0.001, 0.02], "verdict": "undecided"}
    result = {"name": "x", "claim": "It is so.", "metric": "test/acc", "percent": True, "seeds": [0, 1]}
    other = {**one, "expected": "a > c", "difference": -1.0, "interval": [None, None]}
    (tmp_path / "x.json").write_text(json.dumps({**result, "expected": [one, other]}))
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    main(tmp_path, tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    assert "| `x`: It is so. | a > b, test/acc, n = 2 | +1.23 [-0.1, +2] % | undecided |\n" in text
    assert "|  | a > c, test/acc, n = 2 | -100 [?, ?] % | undecided |\n" in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    with pytest.raises(ValueError, match="once each"):
        with_table("no marks", "")
