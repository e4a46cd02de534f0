"""Labelers at work in a real browser: by mouse, by keyboard, by finger; nothing is lost, nothing runs that should not."""

import json
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from prefopt.labeling.answers import import_answers, read_answers
from prefopt.labeling.flags import FLAGS
from prefopt.labeling.key import blind, read_key, write_with_key
from prefopt.labeling.sheet import default_instructions, sheet_page

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>document.title = 'taken over'</script>",
    "<img src=x onerror=alert(2)> <!-- & &amp; {{sheet}} {{script}}",
    "abc \u202e txt.exe \u202d",
    "\u0000\u0007\u001b[31m alone",
    "x" * 100_000,
    "line\u2028line\u2029\nמה שלומך? 猫はよく眠る 👩‍👩‍👧",
]


def export_sheet(rows, path, instructions=None, group=None):
    key, _ = blind(rows, group=group)
    page = sheet_page(key, instructions or default_instructions())
    return SimpleNamespace(sheet=path, key=write_with_key(key, {path: page}))


def open_sheet(context, path, name="ann"):
    """A page that fails the test by any dialog, error or request."""
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.trouble = []
    page.on("dialog", lambda dialog: (page.trouble.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    page.on("console", lambda message: message.type == "error" and page.trouble.append(message.text))
    page.on(
        "request",
        lambda request: request.url.startswith(("file:", "blob:")) or page.trouble.append(request.url),
    )
    page.goto(Path(path).as_uri())
    if name:
        start(page, name)
    return page


def start(page, name="ann"):
    page.fill("#name", name)
    page.press("#name", "Enter")
    page.wait_for_selector("#work:not([hidden])")


def samples(n=10):  # the first n of ten
    rng = random.Random(0)
    rows = []
    for i in range(10):
        k = (4, 2, 9, 3, 5, 4, 3, 2, 6, 4)[i]
        outputs = [f"Answer {j} to {i}. " + "More of it. " * rng.randint(0, 20) for j in range(k)]
        rows.append({"prompt": f"Question {i}?", "completions": outputs, "truncated": [j % 2 == 0 for j in range(k)]})
    rows[3]["completions"] = HOSTILE[:3]
    rows[4]["prompt"] = "</script><script>alert(3)</script>"
    rows[5]["completions"] = HOSTILE[3:7]
    return rows[:n]


def plan(rows, seed):
    """What the labeler means to say of every completion: ties, an opinion against the ratings, all kinds of flags."""
    rng = random.Random(seed)
    meant = []
    for i, row in enumerate(rows):
        k = len(row["completions"])
        ranks = [rng.randint(1, k) for _ in range(k)]
        if i in (0, 6):  # a tie for sure
            ranks[1] = ranks[0]
        said = [[flag for flag in FLAGS if rng.random() < 0.1] for _ in range(k)]
        meant.append({"ranks": ranks, "ratings": [rng.randint(1, 7) for _ in range(k)], "flags": said,
                      "notes": f"note {i} <b>é</b>" if i % 4 == 0 else ""})  # fmt: skip
    return meant


def dense(ranks):
    return [sorted(set(ranks)).index(rank) + 1 for rank in ranks]


def active(page, expression):
    return page.evaluate(f"(() => {{ const e = document.activeElement; return {expression}; }})()")


def drag(page, i, target):
    """Output i by its handle onto an element of the board, with a mouse; out of view, by waiting at the edge."""
    handle = page.locator(f'#board .chip[data-output="{i}"] .handle')
    handle.scroll_into_view_if_needed()
    a = handle.bounding_box()
    x, y = a["x"] + a["width"] / 2, a["y"] + a["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 8, y, steps=2)
    height = page.viewport_size["height"]

    def where():
        b = page.locator(target).bounding_box()
        return b["x"] + b["width"] / 3, b["y"] + b["height"] / 2

    for _ in range(200):
        if 100 < where()[1] < height - 70:
            break
        page.mouse.move(x + 8, 10 if where()[1] < 100 else height - 10)
        page.wait_for_timeout(20)
    page.mouse.move(x + 8, height / 2)  # stop scrolling, then look again
    page.mouse.move(*where(), steps=3)
    page.mouse.up()


def by_mouse(page, task, meant, reload=False):
    shows = task.shows
    for i, places in enumerate(shows):
        card = page.locator(f"#output-{i}")
        details = card.locator("details")
        if not details.evaluate("node => node.open"):
            card.locator("summary").click()
        card.locator(f'.scale input[value="{meant["ratings"][places[0]]}"]').click()
        for flag in meant["flags"][places[0]]:
            card.locator(f'input[value="{flag}"]').click()
    if reload:
        page.reload()
        start(page)
    for i, places in enumerate(shows):
        drag(page, i, f'#board [data-rank="{meant["ranks"][places[0]]}"]')
    if meant["notes"]:
        page.click("#notes")
        page.keyboard.insert_text(meant["notes"])
    page.click("#finish")


def by_keys(page, task, meant):
    """With the keys of one letter."""
    press = page.keyboard.press
    for places in task.shows:
        press("j")
        press(str(meant["ratings"][places[0]]))
        flags = [FLAGS.index(flag) for flag in meant["flags"][places[0]]]
        if flags:
            press("f")
            for n in range(max(flags) + 1):
                if n in flags:
                    press("Space")
                if n < max(flags):
                    press("Tab")
    for places in task.shows:
        press("r")
        press(str(meant["ranks"][places[0]]))
    if meant["notes"]:
        press("n")
        page.keyboard.insert_text(meant["notes"])
    press("Control+Enter")


def by_tab(page, task, meant):
    """With the keys that every form has: Tab, Space, arrows and Enter."""
    press = page.keyboard.press

    def tab_to(expression, most=300):
        for _ in range(most):
            if active(page, expression):
                return
            press("Tab")
        raise AssertionError(f"Tab never came to {expression}")

    for i, places in enumerate(task.shows):
        tab_to(f'e.name === "rating-{i}"')
        press("Space")
        for _ in range(meant["ratings"][places[0]] - 1):
            press("ArrowRight")
        tab_to(f'e.tagName === "SUMMARY" && e.closest("#output-{i}") !== null')
        if meant["flags"][places[0]] and not active(page, "e.parentNode.open"):
            press("Enter")
        for flag in meant["flags"][places[0]]:
            tab_to(f'e.value === "{flag}" && e.closest("#output-{i}") !== null')
            press("Space")
    tab_to('e.closest(".chip") !== null')
    for _ in range(9):
        press("ArrowLeft")
    for places in task.shows:
        for _ in range(meant["ranks"][places[0]]):
            press("ArrowDown")
        press("ArrowRight")
    if meant["notes"]:
        tab_to('e.id === "notes"')
        page.keyboard.insert_text(meant["notes"])
    tab_to('e.id === "finish"')
    press("Enter")


@pytest.mark.parametrize("width", [400, 1280])
def test_five_tasks_by_mouse_and_five_by_keyboard_give_the_rows_that_were_meant(browser, tmp_path, width):
    rows = samples()
    export = export_sheet(rows, tmp_path / "sheet.html", group="train")
    key = read_key(export.key)
    meant = plan(rows, seed=width)
    with browser.new_context(viewport={"width": width, "height": 800}) as context:
        page = open_sheet(context, export.sheet)
        for number, (row, said) in enumerate(zip(rows, meant, strict=True)):
            task = key.tasks[str(number + 1)]
            assert page.locator("#task-title").text_content() == f"Task {number + 1} of 10"
            if number < 5:
                by_mouse(page, task, said, reload=number == 2)
            elif number < 8:
                if number == 5:
                    page.reload()
                    page.locator("#name").focus()
                    page.keyboard.press("Enter")
                    page.wait_for_selector("#work:not([hidden])")
                by_keys(page, task, said)
            else:
                by_tab(page, task, said)
            assert page.locator("#missing").text_content() == "", row
        assert page.locator("#end").is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        with page.expect_download() as download:
            page.keyboard.press("Tab")
            page.keyboard.press("Enter")
        assert download.value.suggested_filename == f"answers-ann-{key.sheet}.jsonl"
        download.value.save_as(tmp_path / "answers.jsonl")
        assert page.trouble == []
    imported = import_answers(read_answers(tmp_path / "answers.jsonl"), [key])
    assert [row.pop("seconds") > 0 for row in imported.rows] == [True] * 10
    assert imported.rows == [
        {
            **row,
            "ranks": dense(said["ranks"]),
            "labeler": "ann",
            "group": "train",
            "ratings": said["ratings"],
            "flags": [{flag: flag in one for flag in FLAGS} for one in said["flags"]],
            "notes": said["notes"],
            "sheet": key.sheet,
            "task": str(number),
        }
        for number, (row, said) in enumerate(zip(rows, meant, strict=True), start=1)
    ]
    assert imported.report.done == imported.report.answers == 10
    assert imported.report.contradictory > 0  # ranks and ratings were drawn apart


def test_hostile_text_is_shown_as_text(browser, tmp_path):
    rows = [{"prompt": text, "completions": HOSTILE} for text in (*HOSTILE, "plain")] + [
        {"prompt": [{"role": text[:50], "content": text}], "completions": ["a", "b"]} for text in HOSTILE
    ]
    export = export_sheet(rows, tmp_path / "sheet.html", instructions="\n\n".join(HOSTILE[:4]))
    key = read_key(export.key)
    with browser.new_context(viewport={"width": 1280, "height": 800}) as context:
        page = open_sheet(context, export.sheet)
        for number, row in enumerate(rows, start=1):
            page.fill("#go", str(number))
            page.press("#go", "Enter")
            for i, places in enumerate(key.tasks[str(number)].shows):
                text = row["completions"][places[0]]
                box = page.locator(f"#output-{i} .text")
                if len(text) > 5000:
                    assert len(box.locator(".prose").text_content()) == 4000
                    box.locator("button").click()
                expected = text
                for character in "\u202e\u202d\u0000\u0007\u001b":
                    expected = expected.replace(character, f"U+{ord(character):04X}")
                assert box.text_content() == expected
        assert page.evaluate("[document.scripts.length, document.images.length]") == [2, 0]
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.title() == "Ranking outputs: ann"
        assert page.trouble == []


def test_the_page_policy_stops_foreign_script_and_markup(browser, tmp_path):
    export = export_sheet(samples(2), tmp_path / "sheet.html")
    with browser.new_context() as context:
        page = open_sheet(context, export.sheet)
        page.evaluate(
            """() => {
              try { document.body.setAttribute("onclick", "window.ran = true"); } catch { }
              document.body.click();
              const style = document.createElement("style");
              style.append("body { opacity: 0.5 }");
              document.head.append(style);
              try { document.body.innerHTML = "<b>markup</b>"; } catch { window.refused = true; }
            }"""
        )
        assert page.evaluate("[window.ran, window.refused, getComputedStyle(document.body).opacity]") == [
            None,
            True,
            "1",
        ]


def test_a_finger_drags_by_the_handle_and_scrolls_elsewhere(browser, tmp_path):
    export = export_sheet(samples(1), tmp_path / "sheet.html")
    with browser.new_context(viewport={"width": 400, "height": 1600}, has_touch=True, is_mobile=True) as context:
        page = open_sheet(context, export.sheet)
        cdp = context.new_cdp_session(page)

        def swipe(source, target):
            page.locator("#ranking").scroll_into_view_if_needed()
            a, b = page.locator(source).bounding_box(), page.locator(target).bounding_box()
            x, y = a["x"] + a["width"] / 2, a["y"] + a["height"] / 2
            to_x, to_y = b["x"] + 80, b["y"] + b["height"] / 2
            cdp.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
            for part in (0.1, 0.4, 0.7, 1):
                point = {"x": x + part * (to_x - x), "y": y + part * (to_y - y)}
                cdp.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
            cdp.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

        def ranks():
            return page.locator("#board .chip").evaluate_all(
                "chips => chips.map((c) => [c.dataset.output, c.querySelector('select').value]).sort()"
            )

        for i, rank in (("0", "2"), ("1", "2"), ("2", "1")):
            swipe(f'.chip[data-output="{i}"] .handle', f'[data-rank="{rank}"]')
        assert ranks() == [["0", "2"], ["1", "2"], ["2", "1"], ["3", ""]]
        swipe('.chip[data-output="3"] .handle', '[data-gap="2"]')  # between: the others make room
        assert ranks() == [["0", "3"], ["1", "3"], ["2", "1"], ["3", "2"]]
        swipe('.chip[data-output="3"] .preview', '[data-rank="4"]')  # not by its text
        assert ranks() == [["0", "3"], ["1", "3"], ["2", "1"], ["3", "2"]]
        assert page.trouble == []


def test_skip_back_change_and_load(browser, tmp_path):
    rows = samples(3)
    export = export_sheet(rows, tmp_path / "sheet.html")
    key = read_key(export.key)
    meant = plan(rows, seed=5)
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        page = open_sheet(context, export.sheet)
        page.keyboard.press("s")
        page.keyboard.press("ArrowDown")  # the second reason
        page.fill("#skip-detail", "law")
        page.click("#skip-confirm")
        page.click("#finish")
        assert "Not rated yet: A, B" in page.locator("#missing").text_content()
        by_keys_from_title(page, key.tasks["2"], meant[1])
        by_mouse(page, key.tasks["3"], meant[2])
        assert page.locator("#progress").text_content() == "2 of 3 done, 1 skipped"
        with page.expect_download() as download:
            page.click("#download")
        download.value.save_as(tmp_path / "first.jsonl")
        page.click("#end-back")
        page.locator('#board .chip[data-output="0"] select').select_option("9")
        assert page.locator("#progress").text_content() == "1 of 3 done, 1 skipped"  # until finished again
        assert page.trouble == []
    with browser.new_context(viewport={"width": 1280, "height": 900}) as elsewhere:
        page = open_sheet(elsewhere, export.sheet, name=None)
        page.set_input_files("#load", tmp_path / "first.jsonl")
        page.wait_for_selector("#work:not([hidden])")
        assert "Loaded 3 answers" in page.locator("#status").text_content()
        assert page.locator("#progress").text_content() == "2 of 3 done, 1 skipped"
        (tmp_path / "odd.jsonl").write_text("no answers")
        page.set_input_files("#load", tmp_path / "odd.jsonl")
        # Not `wait_for_function`: it evaluates a string, which the sheet's policy forbids.
        page.locator("#status").filter(has_text="not a file of answers").wait_for()
        assert page.trouble == []
    assert json.loads((tmp_path / "first.jsonl").read_text().splitlines()[0])["answers"] == 3
    imported = import_answers(read_answers(tmp_path / "first.jsonl"), [key])
    assert imported.report.skip_reasons == {"I lack the knowledge to judge it": 1}
    assert [row["ranks"] for row in imported.rows] == [dense(m["ranks"]) for m in meant[1:]]


def by_keys_from_title(page, task, meant):
    page.locator("#task-title").focus()
    by_keys(page, task, meant)


def test_a_killed_browser_loses_at_most_the_current_task(playwright, chromium, tmp_path):
    rows = samples(4)
    export = export_sheet(rows, tmp_path / "sheet.html")
    key = read_key(export.key)
    profile = tmp_path / "profile"
    context = playwright.chromium.launch_persistent_context(profile, **chromium)
    page = open_sheet(context, export.sheet)
    meant = plan(rows, seed=1)
    for number in range(2):
        by_keys_from_title(page, key.tasks[str(number + 1)], meant[number])
    page.keyboard.press("j")
    page.keyboard.press("4")
    page.wait_for_timeout(300)
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _has_profile(p, profile)]
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    while any(_has_profile(Path(f"/proc/{pid}"), profile) for pid in pids):  # dead processes have no arguments
        time.sleep(0.05)
    (profile / "SingletonLock").unlink(missing_ok=True)
    context = playwright.chromium.launch_persistent_context(profile, **chromium)
    page = open_sheet(context, export.sheet)
    assert page.locator("#progress").text_content() == "2 of 4 done"
    assert page.locator("#task-title").text_content() == "Task 3 of 4"
    context.close()


def _has_profile(process, profile):
    try:
        return f"--user-data-dir={profile}".encode() in (process / "cmdline").read_bytes()
    except OSError:
        return False


def test_a_thousand_tasks_of_nine_open_fast(browser, tmp_path):
    rng = random.Random(1)
    words = ["ranking", "outputs", "takes", "a", "while", "but", "not", "this", "long", "."]
    rows = [
        {"prompt": f"{i} " + " ".join(rng.choices(words, k=60)),
         "completions": [f"{i} {j} " + " ".join(rng.choices(words, k=120)) for j in range(9)]}
        for i in range(1000)
    ]  # fmt: skip
    export = export_sheet(rows, tmp_path / "sheet.html")
    assert export.sheet.stat().st_size > 5_000_000
    with browser.new_context(viewport={"width": 1280, "height": 800}) as context:
        page = context.new_page()
        cdp = context.new_cdp_session(page)
        # Time on the processor, not on the clock, which would be that of whatever else the machine does.
        cdp.send("Performance.enable", {"timeDomain": "threadTicks"})

        def busy():
            return {m["name"]: m["value"] for m in cdp.send("Performance.getMetrics")["metrics"]}["TaskDuration"]

        page.goto(export.sheet.as_uri())
        start(page)
        opened = busy()
        wall = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd / 1000")
        before = busy()
        for number in range(2, 12):
            page.fill("#go", str(number * 90))
            page.press("#go", "Enter")
        step = (busy() - before) / 10
        print(json.dumps({"opened_s": opened, "loaded_on_the_clock_s": wall, "next_task_s": step}))
        assert opened < 2
        assert step < 0.2
