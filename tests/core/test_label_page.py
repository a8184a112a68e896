"""The HTML page for labelling: its content, and how it works in a browser."""

import json
import re
import time

import numpy as np
import pytest
from PIL import Image

from lightning_kd.core.label_page import PageRow, label_page, write_page
from lightning_kd.spreadsheet import read_rows
from tests.browser import Browser, needs_browser, wait_until

NAMES = ["</script><b>x", 'say "yes" & <no>', "=1+1", "猫, кот", "a\\u003cb", "'s"]


def picture(value, side=8):
    return Image.fromarray(np.full((side, side), value, np.uint8))


def page_of(class_names=NAMES, count=6, keep_open=True, none="unknown"):
    rows = []
    for k in range(count):
        path = f"{class_names[k % len(class_names)]}/{k}.png"
        name = class_names[k % len(class_names)]
        facts = [("path", path), ("predicted", name)]
        rows.append(PageRow([k * 10, path], picture(k), facts, name))
    options = {"file_name": "out.csv", "command": "label out.csv --run RUN", "none": none, "keep_open": keep_open}
    return label_page('<title> & "more"', rows, ["index", "path", "label"], class_names, **options)


def content(text):
    (inside,) = re.findall(r'<script type="application/json" id="page">(.*?)</script>', text, re.DOTALL)
    return json.loads(inside)


def test_html_in_class_names_does_not_break_the_page():
    text = page_of()
    assert text.count("</script>") == 2
    found = content(text)
    assert [choice["name"] for choice in found["choices"]] == [*NAMES, "unknown"]
    assert found["rows"][0]["facts"][0] == ["path", "</script><b>x/0.png"]


def test_same_rows_give_the_same_page_and_other_rows_another_key():
    assert page_of() == page_of()
    assert content(page_of())["key"] != content(page_of(count=5))["key"]


def test_page_loads_nothing_from_the_network():
    text = page_of()
    assert "default-src 'none'" in text
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", text)


def test_large_pictures_are_shrunk():
    row = PageRow([0], Image.new("RGB", (3000, 1500), "red"), [("index", "0")], "a")
    text = label_page("t", [row], ["index", "label"], ["a", "b"], file_name="o.csv", command="")
    assert content(text)["rows"][0]["picture"].startswith("data:image/jpeg;base64,")
    assert len(text) < 25_000


def test_failed_page_is_reported_and_leaves_no_file(tmp_path, capsys):
    def fails():
        raise RuntimeError("no idea")

    write_page(tmp_path / "x.html", fails)
    assert "the page x.html could not be written (no idea)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


def opened(browser, tmp_path, text):
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    browser.open(tmp_path / "page.html")
    browser.read("localStorage.clear()")  # choices of an earlier test with the same page
    browser.open(tmp_path / "page.html")
    return browser


def count(browser):
    return browser.read("document.getElementById('count').textContent")


def saved(browser):
    path = browser.downloads / "out.csv"
    path.unlink(missing_ok=True)
    browser.press("s", control=True)
    rows = [cells for _, cells in read_rows(browser.downloaded("out.csv"))]
    return rows[0], {int(row[0]): row[-1] for row in rows[1:]}, rows


@needs_browser
def test_labels_are_chosen_by_keys_and_mouse_and_survive_a_reload(browser, tmp_path):
    opened(browser, tmp_path, page_of())
    assert browser.read("document.title") == '<title> & "more"'
    assert count(browser) == "1 of 6, 0 of 6 chosen"
    browser.press("1", "4", "ArrowRight", "0", "x")  # the third is skipped, x means nothing
    browser.press("Backspace", "ArrowLeft", "Delete")  # back to the fourth, then the third
    browser.press("3", "2")  # the third, then the fourth again
    browser.click("#choices button:nth-child(5)")
    assert count(browser) == "6 of 6, 5 of 6 chosen"
    header, labels, rows = saved(browser)
    assert header == ["index", "path", "label"]
    assert labels == {0: NAMES[0], 10: NAMES[3], 20: NAMES[2], 30: NAMES[1], 40: NAMES[4], 50: ""}
    assert [row[1] for row in rows[1:]] == [f"{name}/{k}.png" for k, name in enumerate(NAMES)]
    assert "label out.csv --run '" + str(tmp_path) in browser.read("document.getElementById('told').textContent")
    time.sleep(1)  # the browser saves what a page stores with a delay
    browser.open(tmp_path / "page.html")  # reload
    assert count(browser) == "6 of 6, 5 of 6 chosen"
    assert saved(browser)[1] == labels
    browser.press("ArrowLeft", "Delete")
    assert saved(browser)[1][40] == ""


@needs_browser
def test_u_means_unknown_and_skipped_rows_are_left_out_of_the_file(browser, tmp_path):
    opened(browser, tmp_path, page_of([str(digit) for digit in range(10)], 5, keep_open=False))
    browser.press("7", "u", "0", "ArrowRight", "Enter")  # class names are digits; Enter takes the prediction
    assert saved(browser)[1] == {0: "7", 10: "unknown", 20: "0", 40: "4"}


@needs_browser
def test_many_classes_are_chosen_by_typing_number_or_name(browser, tmp_path):
    names = [f"class {k}" for k in range(1, 120)] + ["猫"]
    opened(browser, tmp_path, page_of(names, 6))
    browser.press("0", "1", "2")
    browser.press(*"LASS 11", "Enter")  # the first class with this text, unless one equals it
    browser.press("猫", "Enter")
    browser.press("0", "0", "0")
    browser.press("x", "Backspace", "Backspace", "Delete", "ArrowRight")  # typed and deleted again
    browser.press("Enter")
    _, labels, _ = saved(browser)
    assert labels == {0: "class 12", 10: "class 11", 20: "猫", 30: "", 40: "class 5", 50: ""}


@needs_browser
def test_filter_shows_one_predicted_class(browser, tmp_path):
    opened(browser, tmp_path, page_of(["a", "b", "<i>c"], 6))
    options = "[...document.getElementById('filter').options].map(option => option.textContent)"
    assert browser.read(options) == ["all (6)", "<i>c (2)", "a (2)", "b (2)"]
    browser.read("(f => { f.selectedIndex = 3; f.dispatchEvent(new Event('change')) })"
                 "(document.getElementById('filter'))")  # fmt: skip
    assert count(browser) == "1 of 2, 0 of 6 chosen"
    browser.press("3", "3")
    assert saved(browser)[1] == {0: "", 10: "<i>c", 20: "", 30: "", 40: "<i>c", 50: ""}


@needs_browser
def test_pictures_are_shown(browser, tmp_path):
    opened(browser, tmp_path, page_of(count=3))
    wait_until(lambda: browser.read("document.getElementById('picture').naturalWidth") == 8)
    assert browser.read("document.getElementById('picture').className") == "small"


def names_chosen(browser):
    return browser.read("Object.entries(chosen).map(([k, c]) => [Number(k), choices[c].name])")


@needs_browser
@pytest.mark.parametrize(
    ("class_names", "keys", "expected"),
    [
        (["1", "10", "2"], ["2", "1", "0", "1", "Enter", "u"], ["2", "10", "1", "unknown"]),
        (sorted(map(str, range(1, 13))), ["1", "2", "1", "0", "1", "Enter", "7"], ["12", "10", "1", "7"]),
        (["01", "02"], ["0", "2", "0", "1"], ["02", "01"]),
        ([*"abcdefghi", "12 men", "x", "y", "z"], ["1", "2", "Backspace", "3", "1", "2", "Enter"], ["z", "y"]),
    ],
)
def test_typed_number_means_the_class_of_that_name_before_its_position(browser, tmp_path, class_names, keys, expected):
    opened(browser, tmp_path, page_of(class_names, 5))
    browser.press(*keys)
    assert [name for _, name in names_chosen(browser)] == expected


@needs_browser
@pytest.mark.parametrize("name", ["cat", "Cat", "CAT"])
def test_names_that_differ_only_in_case_can_be_typed(browser, tmp_path, name):
    opened(browser, tmp_path, page_of(["CAT", "Cat", "cat", *"abcdefgh"], 3))
    browser.press(*name)
    assert browser.read("document.querySelector('#choices .first bdi').textContent") == name
    browser.press("Enter")
    assert names_chosen(browser) == [[0, name]]


@needs_browser
@pytest.mark.parametrize("key", ["1", "Enter"])
def test_a_key_held_down_chooses_once(browser, tmp_path, key):
    opened(browser, tmp_path, page_of(["a", "b"], 6))
    for k in range(4):
        browser.call("Input.dispatchKeyEvent", type="keyDown", key=key, autoRepeat=k > 0)
    browser.call("Input.dispatchKeyEvent", type="keyUp", key=key)
    assert names_chosen(browser) == [[0, "a"]]


@needs_browser
def test_enter_presses_the_focused_button(browser, tmp_path):
    opened(browser, tmp_path, page_of(["a", "b"], 6))  # the prediction is a
    browser.read("document.querySelector('#choices button:nth-child(2)').focus()")
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", windowsVirtualKeyCode=13, text="\r")
    assert names_chosen(browser) == [[0, "b"]]


@needs_browser
def test_two_windows_of_one_page_share_their_choices(browser, tmp_path):
    opened(browser, tmp_path, page_of(["a", "b"], 6))
    browser.press("1", "1")
    with browser.second(tmp_path / "page.html"):
        assert names_chosen(browser) == [[0, "a"], [1, "a"]]
    browser.press("2")
    with browser.second(tmp_path / "page.html"):
        browser.press("Delete", "2")
    with browser.second(tmp_path / "page.html"):
        assert names_chosen(browser) == [[0, "a"], [1, "a"], [2, "b"], [3, "b"]]
    assert saved(browser)[1] == {0: "a", 10: "a", 20: "b", 30: "b", 40: "", 50: ""}


@needs_browser
def test_choice_deleted_in_another_window_stays_deleted(browser, tmp_path):
    opened(browser, tmp_path, page_of(["a", "b"], 6))
    browser.press("1", "1")
    with browser.second(tmp_path / "page.html"):
        browser.press("Home", "Delete")
    wait_until(lambda: '"0"' not in browser.read("localStorage.getItem(storage)"))  # windows are other processes
    browser.press("2")
    assert names_chosen(browser) == [[1, "a"], [2, "b"]]


@needs_browser
def test_page_announces_the_last_row_and_the_second_file_name(browser, tmp_path):
    opened(browser, tmp_path, page_of(["a", "b"], 3))
    browser.press("1", "ArrowRight", "2")
    told = "document.getElementById('told').textContent"
    assert browser.read(told).startswith("That was the last one; 1 are open.")
    browser.press("s", control=True)
    assert "(out (1).csv, where you saved it before: take the newest)" in browser.read(told)


@needs_browser
def test_a_narrow_screen_shows_picture_and_choices(browser, tmp_path):
    metrics = {"width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    browser.call("Emulation.setDeviceMetricsOverride", **metrics)
    try:
        opened(browser, tmp_path, page_of(["a", "b"], 3))
        bottom = browser.read("document.querySelector('#choices button').getBoundingClientRect().bottom")
        assert bottom < 520
        assert browser.read("document.documentElement.scrollWidth") <= 360
    finally:
        browser.call("Emulation.clearDeviceMetricsOverride")


@needs_browser
def test_digit_keys_work_on_other_keyboard_layouts(browser, tmp_path):
    opened(browser, tmp_path, page_of([str(digit) for digit in range(10)], 6))
    pressed = [("&", "Digit1", 0), ("é", "Digit2", 0), ("3", "Digit3", 8), ("!", "Digit1", 8), ("U", "KeyU", 8)]
    for key, code, modifiers in pressed:
        browser.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=code, modifiers=modifiers)
    assert names_chosen(browser) == [[0, "1"], [1, "2"], [2, "3"], [3, "unknown"]]


@needs_browser
def test_choices_can_be_saved_when_browser_storage_fails(browser, tmp_path):
    opened(browser, tmp_path, page_of(["a", "b"], 4))
    browser.press("1")
    browser.read("Storage.prototype.setItem = () => { throw new Error('full') }")
    browser.press("2", "Backspace", "1", "2")
    assert "keeps nothing" in browser.read("document.getElementById('told').textContent")
    assert saved(browser)[1] == {0: "a", 10: "a", 20: "b", 30: ""}
