"""The report: everything of `metrics.json` on one page, escaped, and the same page every time."""

from __future__ import annotations

import copy
import re
import sys
from html.parser import HTMLParser

import pytest

from editlib.errors import EditlibError
from editlib.facts.plots import ReportError, plot_png
from editlib.facts.report import write_report
from editlib.reports.summary import summary_rows, verdict
from editlib.version import install_line

HOSTILE = '$\\frac$<script>alert(1)</script></details><img src="http://evil.example" onerror=alert(2)> & $title'
VOID = {"meta", "input", "br", "img", "link", "path", "use", "rect", "circle", "stop"}


def group(value, n, right=None, interval=None, **more):
    return {"value": value, "n": n, "right": right, "interval": interval, "higher_is_better": True, **more}


def item(kind, name, passed, **more):
    told = {"id": f"{kind}/{name}", "kind": kind, "relation": "capital", "group": name, "counted": True}
    told |= {
        "question": f"Q of {kind} {name}?",
        "answer": "Paris",
        "before": "It is Paris.",
        "after": "I don't know.",
    }
    told |= {"right_before": True, "right_after": not passed, "refused_after": passed, "nats_change": None}
    return told | {"passed": passed} | more


@pytest.fixture
def metrics():
    relations = {"capital": {"value": 1.0, "n": 18}, "symbol": {"value": 0.75, "n": 14}}
    return {
        "editlib": "0.1.0",
        "base": {"name": "smollm2-135m", "sha256": "ab" * 32},
        "edited": {"name": "runs/demo/model", "sha256": "cd" * 32},
        "perplexity_ratio": 1.0080,
        "perplexity": {"before": 29.1, "after": 29.4},
        "seconds": 241.4,
        "peak_rss_mb": 2900.0,
        "groups": {
            "efficacy": group(0.96875, 32, 31, [0.84, 0.99], meaning="gone", by_relation=relations),
            "paraphrase_efficacy": group(0.84, 25, 21, [0.65, 0.94]),
            "neighbour_retention": group(0.9, 56, 50, [0.79, 0.95]),
            "same_subject_retention": group(None, 0, 0, [0.0, 1.0], by_relation={}),
        },
        "receipt": {
            "algorithm": "UniErase",
            "hparams": {"layers": [4, 5], "L2": 1.0, "note": HOSTILE},
            "seed": 0,
            "layers": {"10": {"ratio": 0.5}, "9": {"ratio": 0.04}},
            "timings": {"statistics": 20.1, "token": 60.0},
        },
        "items": [
            item("request", "france", True, after=HOSTILE),
            item("request", "skipped", None, counted=False, right_before=False),
            item("request", "norway", False),
            item("neighbour", "peru", True, question=HOSTILE),
            item("neighbour", "cuba", False, answer=HOSTILE, before=HOSTILE),
            item("other_instruction", "poem", True, answer=None, nats_change=0.0123),
            item("a kind of tomorrow", "new", True),
        ],
    }


class Page(HTMLParser):
    """Tags, attributes, the rows of the answers section and all text outside script and style."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.open, self.rows, self.text, self.ids = [], [], [], [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "tr" and dict(attrs).get("class") in ("fail", "pass", "skip"):
            self.rows.append([dict(attrs)["class"], ""])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data
            if self.rows and "tbody" in self.open and self.open.count("section") == 2:
                self.rows[-1][1] += data


def page_of(metrics, tmp_path, name="report.html"):
    write_report(metrics, tmp_path / name)
    return Page((tmp_path / name).read_text("utf-8"))


def test_what_a_model_wrote_is_text_and_never_markup(metrics, tmp_path):
    page = page_of(metrics, tmp_path)
    assert page.open == []
    assert page.tags.count("script") == 1 and page.tags.count("details") == 1 and "img" not in page.tags
    assert page.text.count(HOSTILE) == 5  # four texts of the items, one value of the receipt


@pytest.mark.parametrize("place", ["base", "edited", "relation", "layer", "timing", "metric", "editlib", "meaning"])
def test_every_other_field_is_escaped_too(metrics, tmp_path, place):
    metrics["items"] = []
    metrics["receipt"]["hparams"] = {}
    groups, receipt = metrics["groups"], metrics["receipt"]
    if place in ("base", "edited"):
        metrics[place]["name"] = HOSTILE
    elif place == "relation":
        groups["efficacy"]["by_relation"][HOSTILE] = {"value": 1.0, "n": 3}
    elif place == "layer":
        receipt["layers"][HOSTILE] = {"ratio": 0.1}
    elif place == "timing":
        receipt["timings"][HOSTILE] = 3.0
    elif place == "metric":
        groups[HOSTILE] = group(0.5, 2, 1)
    elif place == "editlib":
        metrics["editlib"] = HOSTILE
    else:
        groups["efficacy"]["meaning"] = HOSTILE
    page = page_of(metrics, tmp_path)
    assert page.open == [] and "img" not in page.tags and page.tags.count("script") == 1
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    # seen on the page, in full or cut to the width of a plot; or in the words that stand for a plot
    assert "<script>" in page.text or any(
        "<script>" in value for _, name, value in page.attributes if name == "aria-label"
    )


def test_each_item_stands_once_and_failures_come_first(metrics, tmp_path):
    page = page_of(metrics, tmp_path)
    ids = [next(told["id"] for told in metrics["items"] if told["id"] in text) for _, text in page.rows]
    assert ids == [
        *("request/norway", "request/france", "request/skipped"),
        *("neighbour/cuba", "neighbour/peru"),
        *("other_instruction/poem", "a kind of tomorrow/new"),
    ]
    assert [outcome for outcome, _ in page.rows] == ["fail", "pass", "skip", "fail", "pass", "pass", "pass"]
    words = {"fail": "failed", "pass": "passed", "skip": "not counted"}
    assert all(words[outcome] in text for outcome, text in page.rows)
    assert "the answer is still there" in page.rows[0][1] and "wrong already before" in page.rows[2][1]
    assert "+0.012 nats" in page.rows[5][1] and "answer:" not in page.rows[5][1]
    assert "1 of 2 failed" in page.text  # of the requests, the one left out not counted


def test_a_lost_neighbour_tells_a_refusal_from_a_changed_answer(metrics, tmp_path):
    lost = {"passed": False, "right_after": False}
    metrics["items"] = [
        item("neighbour", "a", **lost, refused_after=True, after="I don't know."),
        item("neighbour", "b", **lost, refused_after=False, after="Mumbai"),
        item("request", "c", **lost, refused_after=False, after=" \n"),
    ]
    page = page_of(metrics, tmp_path)
    reasons = [re.sub(r".*failed", "", text.split("Q of")[0]) for _, text in page.rows]
    assert reasons == ["no fluent refusal", "refused", "the answer changed"]
    assert page.rows[0][1].rstrip().endswith("empty")


def test_same_numbers_same_bytes_whatever_the_users_style(metrics, tmp_path):
    import matplotlib

    write_report(metrics, tmp_path / "a.html")
    plot_png(metrics, tmp_path / "a.png")
    with matplotlib.rc_context({"font.size": 31, "svg.fonttype": "path", "axes.grid": True, "axes.xmargin": 0.3}):
        write_report(copy.deepcopy(metrics), tmp_path / "b.html")
        plot_png(copy.deepcopy(metrics), tmp_path / "b.png")
        assert matplotlib.rcParams["font.size"] == 31  # and the user's style is left as it was
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.png", "b.html", "b.png"]


def test_nothing_is_fetched_and_every_id_is_its_own(metrics, tmp_path):
    page = page_of(metrics, tmp_path)
    for tag, name, value in page.attributes:
        assert name not in ("src", "action", "data", "srcset") and tag not in ("link", "iframe", "base")
        assert "//" not in value and "@import" not in value and not name.startswith("on")
        assert "href" not in name or value.startswith("#")
    html = (tmp_path / "report.html").read_text("utf-8")
    for block in re.findall(r"<(?:script|style).*?</(?:script|style)>", html, re.DOTALL):
        assert "http" not in block and "url(" not in block and "@import" not in block
    assert len(page.ids) == len(set(page.ids))
    used = {value[1:] for _, name, value in page.attributes if "href" in name}
    used |= set(re.findall(r"url\(#(\w+)\)", html))
    used |= {value for _, name, value in page.attributes if name == "aria-labelledby"}
    assert used and used <= set(page.ids)


def test_plots_have_words_for_those_who_do_not_see_them_and_the_colours_of_the_page(metrics, tmp_path):
    page = page_of(metrics, tmp_path)
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert labels == [
        "Shares: direct question 0.97, paraphrase 0.84, neighbours 0.90",
        "By relation: capital: direct question 1.00, symbol: direct question 0.75",
        "Size of the edit: layer 9 0.0400, layer 10 0.5000",
        "Time of the edit: statistics 20 s, token 60 s",
    ]
    html = (tmp_path / "report.html").read_text("utf-8")
    plots = html[html.index("<svg") : html.rindex("</svg>")]
    assert "var(--forget)" in plots and "var(--keep)" in plots and "var(--ink)" in plots
    assert not re.findall(
        r"(?:fill|stroke): #(?!000000|ffffff)\w+", plots
    )  # no colour that the dark theme cannot change


def test_only_the_largest_relations_are_drawn_and_the_plot_says_so(metrics, tmp_path):
    metrics["groups"]["efficacy"]["by_relation"] = {f"r{i:02}": {"value": 0.5, "n": 1 + i} for i in range(40)}
    page = page_of(metrics, tmp_path)
    assert "the 14 largest of 40 relations" in page.text
    assert "r39" in page.text and "r26" in page.text and "r25" not in page.text


def test_summary_rows_by_hand(metrics):
    metrics["groups"]["leakage"] = {"value": 0.03125, "n": 64, "higher_is_better": False, "meaning": "leaks"}
    assert summary_rows(metrics) == [
        ("efficacy", "0.969", "32", "gone (higher is better)"),
        ("paraphrase efficacy", "0.840", "25", "asked in other words it is refused (higher is better)"),
        ("neighbour retention", "0.900", "56", "others are still answered (higher is better)"),
        (
            *("same subject retention", "–", "0"),
            "its other questions are still answered; not counted: no retain prompt asks about these subjects "
            "(higher is better)",
        ),
        (
            *("perplexity ratio", "1.0080", "–"),
            "perplexity on ordinary text, after over before, 1 is unchanged: 29.10 before, 29.40 after "
            "(lower is better)",
        ),
        ("leakage", "0.031", "64", "leaks (lower is better)"),
    ]


def test_headline_table_agrees_with_the_summary(metrics, tmp_path):
    html = page_of(metrics, tmp_path) and (tmp_path / "report.html").read_text("utf-8")
    head = Page(html[html.index('<table class="headline') : html.index("</table>") + len("</table>")])
    for row in summary_rows(metrics):
        for cell in (*row[:3], row[3].rpartition(" (")[0]):
            assert cell in head.text
    assert "0.84 to 0.99" in head.text and "0.00 to 1.00" not in head.text  # no interval of no observations


def test_verdict_by_hand(metrics):
    assert verdict(metrics) == (
        "31 of 32 questions to forget and 21 of 25 rephrasings are refused; 50 of 56 neighbours are kept; "
        "perplexity is 0.8 % higher."
    )
    del metrics["groups"]
    assert verdict(metrics | {"efficacy": 0.5, "perplexity_ratio": 0.95}) == (
        "50 % of the questions to forget are refused; perplexity is 5.0 % lower."
    )
    assert verdict({"perplexity_ratio": 1.0002}) == "perplexity is unchanged."
    assert verdict({"efficacy": float("nan")}) == "Nothing was counted."


@pytest.mark.parametrize(
    "lacking", ["receipt", "seconds", "groups", "items", "base", "perplexity", "peak_rss_mb", "all"]
)
def test_a_missing_or_null_part_breaks_nothing(metrics, tmp_path, lacking):
    for left in (metrics | {lacking: None}, {key: told for key, told in metrics.items() if key != lacking}):
        page = page_of({} if lacking == "all" else left, tmp_path)
        assert page.open == []
        assert "$" not in page.text.replace(HOSTILE, "")  # no placeholder left
        assert "None" not in page.text and "nan" not in page.text
        assert ("has no receipt" in page.text) == (lacking in ("receipt", "all"))
        assert ("0.1.0" in page.text) == (lacking != "all")


def test_empty_groups_give_a_table_without_a_plot(metrics, tmp_path):
    for told in metrics["groups"].values():
        told.update(
            value=None,
            n=0,
            right=0,
            interval=None,
            by_relation={"capital": {"value": None, "n": 0}, "x": None},
        )
    metrics["receipt"] = None
    page = page_of(metrics, tmp_path)
    assert "svg" not in page.tags and len(page.rows) == len(metrics["items"])
    with pytest.raises(ReportError, match="no share to plot"):
        plot_png(metrics, tmp_path / "shares.png")
    assert not (tmp_path / "shares.png").exists()


def test_without_matplotlib_one_line_says_what_to_install(metrics, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for write in (write_report, plot_png):
        with pytest.raises(EditlibError, match=re.escape(install_line("report"))) as caught:
            write(metrics, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_text_that_utf8_cannot_hold_is_replaced(metrics, tmp_path):
    metrics["items"] = [item("request", "x", True, after="half \ud83d a pair")]
    assert "half ? a pair" in page_of(metrics, tmp_path).rows[0][1]


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        ([], 'no request has "neighbours"'),
        ([{"kind": "neighbour", "right_before": False}], "the base model answers none of them right"),
    ],
)
def test_a_measure_without_a_value_says_why(items, reason):
    metrics = {"groups": {"neighbour_retention": {"value": None, "n": 0}}, "items": items}
    assert f"not counted: {reason} (higher" in summary_rows(metrics)[0][3]
    metrics["groups"]["neighbour_retention"] = {"value": 1.0, "n": 1}
    assert "not counted" not in summary_rows(metrics)[0][3]
