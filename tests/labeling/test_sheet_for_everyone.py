"""A sheet says what it shows: every control by a name, every script in its direction, everything within the screen."""

import pytest

from prefopt.labeling.key import blind
from prefopt.labeling.sheet import default_instructions, sheet_page

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

CODE = (
    "Use:\n```python\nreturn [x for x in xs if x not in seen]  # " + "on and on " * 20 + "\n```\nIt keeps the order."
)
ROWS = [
    {"prompt": "كيف أطبخ الأرز؟ 2 كوب", "completions": ["اغسل الأرز (3 مرات).", CODE, "猫はよく眠る" * 40, "w" * 3000]},
    {"prompt": "Second", "completions": ["a", "b"]},
]  # fmt: skip
NAMED = {"article", "button", "checkbox", "combobox", "dialog", "link", "navigation", "progressbar", "radio", "region",
         "spinbutton", "textbox"}  # fmt: skip


def open_sheet(context, tmp_path):
    path = tmp_path / "sheet.html"
    path.write_text(sheet_page(blind(ROWS, seed=0)[0], default_instructions()), encoding="utf-8")
    page = context.new_page()
    page.goto(path.as_uri())
    return page


def start(page):
    page.fill("#name", "ann")
    page.press("#name", "Enter")
    page.wait_for_selector("#work:not([hidden])")


def heard(page):
    """What a screen reader is told, as (role, name) in the order of the page."""
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    return [
        (node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")
    ]


def test_a_screen_reader_hears_a_name_for_everything(browser, tmp_path):
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        page = open_sheet(context, tmp_path)
        views = [heard(page)]
        start(page)
        page.locator("#board select").first.select_option("2")
        views.append(heard(page))
        for button in ("#skip", "#keys", "#read"):
            page.click(button)
            views.append(heard(page))
            page.keyboard.press("Escape")
        for view in views:
            assert [role for role, name in view if role in NAMED and not name.strip()] == []
        beginning, task, skip, _, _ = views
        assert ("textbox", "Your name or number, the same each time") in beginning
        for letter in "ABCD":
            assert ("article", f"Output {letter}") in task
            assert ("combobox", f"Rank of output {letter}") in task
        assert task.count(("radio", "3 of 7")) == 4
        assert task.count(("radio", "7 of 7, very good")) == 4
        assert sum(role == "checkbox" for role, _ in task) == 44
        for rank in ("Not ranked yet", "Rank 1 best", "Rank 2", "Rank 3", "Rank 4 worst"):
            assert ("list", rank) in task
        assert ("StaticText", "A: rank 2") in task  # the status line, read out
        assert ("progressbar", "0 of 2 done") in task
        assert ("dialog", "Skip this task") in skip


@pytest.mark.parametrize("width", [400, 1280])
def test_every_script_has_its_direction_and_nothing_leaves_the_screen(browser, tmp_path, width):
    with browser.new_context(viewport={"width": width, "height": 800}) as context:
        page = open_sheet(context, tmp_path)
        start(page)
        shown = page.locator("#outputs .prose, #prompt .prose, #outputs .code").evaluate_all(
            """boxes => boxes.map((box) => {
                 const range = document.createRange();
                 range.selectNodeContents(box);
                 const line = range.getClientRects()[0], edge = box.getBoundingClientRect();
                 const near = line.left - edge.left < edge.right - line.right || line.width > edge.width;
                 return [box.textContent.slice(0, 4), near ? "left" : "right", box.scrollWidth > box.clientWidth];
               })"""
        )
        # where the first line starts, and whether the box scrolls by itself
        assert sorted(shown) == sorted(
            [
                ["كيف ", "right", False],
                ["اغسل", "right", False],
                ["Use:", "left", False],
                ["```p", "left", True],
                ["It k", "left", False],
                ["猫はよく", "left", False],
                ["wwww", "left", False],
            ]
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        scale = page.locator(".scale").first
        tops = scale.locator(":scope > *").evaluate_all("parts => parts.map((p) => p.getBoundingClientRect().bottom)")
        assert max(tops) - min(tops) < 20  # from "bad" to "good" on one line
        assert scale.locator(".point").first.bounding_box()["width"] >= 24  # large enough for a finger


def test_what_was_said_of_one_task_does_not_stand_over_the_next(browser, tmp_path):
    with browser.new_context() as context:
        page = open_sheet(context, tmp_path)
        start(page)
        page.locator("#board select").first.select_option("1")
        assert page.locator("#status").text_content() == "A: rank 1"
        page.fill("#go", "2")
        page.press("#go", "Enter")
        assert page.locator("#status").text_content() == ""
        for i in "01":
            page.check(f'#output-{i} .scale input[value="4"]')
            page.locator(f'#board .chip[data-output="{i}"] select').select_option("1")
        page.click("#finish")
        assert page.locator("#status").text_content() == "Task 2 done. Saved."
