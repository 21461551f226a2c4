from html.parser import HTMLParser

import pytest

from nanollava.benchmarks.report import Told, curve, round_numbers, smooth, table, write_report

LOG = [{"step": step, "loss": 2.0 / (1 + step)} for step in range(40)]
LOG[-1]["held_out_loss"] = 0.06


class Page(HTMLParser):
    """What a browser would show, and what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.addresses = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "line", "polyline", "circle"):
            self.open.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_data(self, data):
        self.words.append(data)


def test_a_running_mean_begins_with_what_there_is():
    assert smooth([4.0, 2.0, 0.0, 10.0], width=2) == [4, 3, 1, 5]


def test_axes_have_round_numbers():
    assert round_numbers(0.03, 3) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])


def test_the_curve_falls_where_the_loss_does_and_has_a_dot_for_held_out_data():
    svg = curve(LOG)
    heights = [float(point.split(",")[1]) for point in svg.split('class="mean" points="')[1].split('"')[0].split()]
    assert len(heights) == 40 and heights == sorted(heights)  # y counts from above
    assert svg.count("<circle") == 1
    assert curve(LOG[:1]) and curve([{"step": 0, "loss": 0.0}])  # a run of one step, a loss of nothing


def test_a_table_leaves_open_what_a_column_does_not_have():
    lines = table({"one": {"kind": 50.0, "all": 80.0}, "other": {"all": 7.25}}).splitlines()
    assert lines[1].split() == ["kind", "50.0%"] and lines[2].split() == ["all", "80.0%", "7.2%"]


def test_the_page_is_one_file_with_everything_in_it(world, tmp_path):
    picture = next((world / "images").iterdir())
    told = [Told("<image>\nWhat color?", "Red & <b>bright</b>.", "Blue.", False), Told("Is it?", "Yes.", "Yes.", True)]
    write_report(tmp_path / "report.html", "A <run>", {"Stage 1": LOG, "nothing yet": []},
                 {"after": {"kind": 97.25, "all": 98.0}, "before": {"all": 3.0}}, [(picture, told), (None, told[1:])])
    page = Page((tmp_path / "report.html").read_text())
    assert page.open == []  # what was opened is closed
    assert len(page.addresses) == 1 and page.addresses[0].startswith("data:image/png;base64,")
    words = " ".join(page.words)
    for text in ("A <run>", "Stage 1", "97.2%", "3.0%", "What color?", "✗ Red & <b>bright</b>.", "Blue.", "✓ Yes."):
        assert text in words
    assert "nothing yet" not in words and "<image>" not in words
    assert words.count("Yes.") == 2  # the truth stands there only where the reply is not right
