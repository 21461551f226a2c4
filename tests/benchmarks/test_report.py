from html.parser import HTMLParser

import pytest

from nanollava.benchmarks.report import (
    Exchange,
    axis_ticks,
    loss_curve,
    running_mean,
    write_report,
)

LOG = [{"step": step, "loss": 2.0 / (1 + step)} for step in range(40)]
LOG[-1]["val_loss"] = 0.06


class Page(HTMLParser):
    """What a browser shows, and the addresses that it loads."""

    def __init__(self, text):
        super().__init__()
        self.open_tags, self.texts, self.addresses = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "line", "polyline", "circle"):
            self.open_tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_data(self, data):
        self.texts.append(data)


def test_running_mean_of_the_first_values_is_over_fewer():
    assert running_mean([4.0, 2.0, 0.0, 10.0], width=2) == [4, 3, 1, 5]


def test_axis_ticks_are_round_numbers():
    assert axis_ticks(0.03, 3) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])


def test_loss_curve_falls_with_the_loss_and_marks_validation():
    svg = loss_curve(LOG)
    points = svg.split('class="mean" points="')[1].split('"')[0].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert len(heights) == 40 and heights == sorted(set(heights))  # y counts from the top
    assert svg.count("<circle") == 1


def test_loss_curve_of_one_step_and_of_loss_zero():
    assert loss_curve(LOG[:1]) and loss_curve([{"step": 0, "loss": 0.0}])


def test_report_is_one_file_with_all_its_parts(world, tmp_path):
    image = next((world / "images").iterdir())
    exchanges = [Exchange("<image>\nWhat color?", "Red & <b>bright</b>.", "Blue.", False),
                 Exchange("Is it?", "Yes.", "Yes.", True)]
    write_report(tmp_path / "report.html", "A <run>", {"Stage 1": LOG, "nothing yet": []},
                 {"after": {"kind": 97.25, "all": 98.0}, "before": {"all": 3.0}},
                 [(image, exchanges), (None, exchanges[1:])])
    page = Page((tmp_path / "report.html").read_text())
    assert page.open_tags == []
    assert len(page.addresses) == 1 and page.addresses[0].startswith("data:image/png;base64,")
    text = " ".join(page.texts)
    for part in ("A <run>", "Stage 1", "97.2%", "3.0%", "What color?", "✗ Red & <b>bright</b>.",
                 "Blue.", "✓ Yes.", "validation loss"):
        assert part in text
    assert "nothing yet" not in text and "<image>" not in text
    assert text.count("Yes.") == 2  # the answer is shown only under a wrong reply
