"""The table of attacks on the report: shares, counts and intervals, escaped, and nothing where there was no attack."""

from editlib.facts.report import write_report
from editlib.reports.attacks import attack_section


def share(leaked, n, skipped=0):
    rate = leaked / n if n else None
    return {"leaked": leaked, "n": n, "rate": rate, "interval": [rate, rate], "wilson": [0.0, 0.11], "skipped": skipped}


RESULTS = [
    {"attack": "few-shot", "meaning": "<b>shown</b>", "shares": {"edited": share(8, 32), "base": share(32, 32)}},
    {"attack": "prefill-own", "meaning": "own", "shares": {"edited": share(0, 32), "control": share(0, 0)}},
]


def test_shares_with_their_counts_and_intervals():
    html = attack_section(RESULTS)
    assert '<td data-label="edited model">0.25<small>8 of 32</small><small>0.25 to 0.25</small></td>' in html
    assert "0.00<small>0 of 32</small><small>0.00 to 0.11</small>" in html  # none leaked: Wilson's interval
    assert html.count("not tried") == 3  # no control, no base, and a control of no facts
    assert "&lt;b&gt;shown" in html and "<b>shown" not in html


def test_no_attack_no_section(tmp_path):
    assert attack_section([]) == ""
    write_report({}, tmp_path / "without.html")
    write_report({"attacks": RESULTS}, tmp_path / "with.html")
    assert 'id="attacks"' not in (tmp_path / "without.html").read_text()
    page = (tmp_path / "with.html").read_text()
    assert page.index('id="measures"') < page.index('id="attacks"') < page.index('id="answers"')
