"""A receipt to hand on: it tells what was asked, or, made private, not one word of it."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import stat

import pytest
from facts.test_report import metrics  # noqa: F401  (a fixture)

from editlib.errors import EditlibError, OutputError, RequestError
from editlib.export.private import private_receipt
from editlib.reports.receipt import write_receipt
from editlib.requests.reading import requests_hash, write_requests
from editlib.requests.request import EditRequest

REQUESTS = [
    EditRequest(
        id="case-quorlbex",
        prompt="Wherein dwells {}?",
        subject="Zanfrible Ömpkin",
        answer="Gruntholm",
        paraphrases=("Whereabouts sits {} presently?",),
        neighbours=("Wherein dwells Plimsnark?",),
    ),
    EditRequest(id="Vexdrool/7", prompt="<b>Whomso</b> wed {}?", subject="Yaltic", answer="Gruntholm"),
]


@pytest.fixture
def receipt():
    return {
        "editlib": "0.1.0",
        "algorithm": "UniErase",
        "created": "2026-03-01T10:00:00+00:00",
        "versions": {"python": "3.11", "torch": "2.13"},
        "base": {"name": "/home/zanfrible/smollm2-135m", "sha256": "ab" * 32},
        "seed": 0,
        "hparams": {"layers": [4, 5], "v_lr": 0.5, "solve": "exact", "context_templates": ["{}", "Yaltic? {}"]},
        "requests_sha256": requests_hash(REQUESTS),
        "requests": [{"id": one.id, "steps": 7, "target_nll": 0.25, "note": "Gruntholm"} for one in REQUESTS],
        "anchors": ["capital/plimsnark"],
        "stats_sha256": "cd" * 32,
        "stats": {"4": "/home/zanfrible/stats/4.npz"},
        "token": {"token": "[UNL]", "seed": 0, "refusal_nll": 1.5},
        "layers": {"4": {"ratio": 0.04}},
        "timings": {"values": 3.5},
        "result_sha256": "ef" * 32,
        "unheard_of": "Gruntholm",
    }


@pytest.fixture
def edited(receipt, tmp_path):
    path = tmp_path / "edited"
    path.mkdir()
    (path / "editlib.json").write_text(json.dumps(receipt))
    return path


@pytest.fixture
def asked(tmp_path):
    write_requests(tmp_path / "asked.jsonl", REQUESTS)
    return tmp_path / "asked.jsonl"


@pytest.fixture
def measured(metrics, tmp_path):  # noqa: F811
    metrics["edited"]["sha256"] = "ef" * 32
    metrics["groups"]["Gruntholm"] = {"value": 1.0, "n": 1, "meaning": "Yaltic"}
    for one in metrics["items"]:
        one["question"], one["id"] = "Wherein dwells Zanfrible Ömpkin?", "case-quorlbex"
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    return tmp_path / "metrics.json"


def words():
    text = json.dumps([one.to_dict() for one in REQUESTS], ensure_ascii=False)
    names = {"id", "prompt", "subject", "answer", "paraphrases", "neighbours"}  # of the fields, not of the requests
    return {word for word in re.findall(r"\w+", text) if len(word) > 1} - names


def test_the_page_tells_what_was_asked_and_what_came_of_it(edited, asked, measured, tmp_path):
    page, key = write_receipt(edited, tmp_path / "out", requests_file=asked, metrics_file=measured)
    text = page.read_text()
    assert key is None and sorted(path.name for path in page.parent.iterdir()) == ["receipt.html", "receipt.json"]
    for shown in (
        "2 facts unlearned from", "Zanfrible Ömpkin", "Gruntholm", "case-quorlbex", "2026-03-01 10:00:00 UTC",
        "ab" * 32, "ef" * 32, "UniErase", "right before", "0.969", "0.25", "&lt;b&gt;Whomso&lt;/b&gt;",
    ):  # fmt: skip
        assert shown in text, shown
    told = json.loads((page.parent / "receipt.json").read_text())
    assert told["asked"][0]["question"] == "Wherein dwells Zanfrible Ömpkin?" and told["seed"] == 0
    assert told["metrics"]["perplexity"] == {"before": 29.1, "after": 29.4}
    assert told["metrics"]["groups"]["efficacy"]["right"] == 31 and "Gruntholm" not in told["metrics"]["groups"]


@pytest.mark.parametrize("with_metrics", [True, False])
def test_a_private_receipt_holds_not_one_word(edited, asked, measured, tmp_path, with_metrics):
    out = tmp_path / "out"
    page, key = write_receipt(
        edited, out, requests_file=asked, metrics_file=measured if with_metrics else None, private=True
    )
    whole = b"".join(path.read_bytes() for path in sorted(out.iterdir())).decode().casefold()
    assert len(words()) > 12
    for word in words():
        assert word.casefold() not in whole, word
    assert requests_hash(REQUESTS) not in whole and json.loads(key.read_text())["salt"] not in whole
    assert "0.25" in whole and "ef" * 32 in whole and '"solve": "exact"' in whole
    assert ("right before" in whole) == with_metrics
    assert key == tmp_path / "out.private.json" and stat.S_IMODE(key.stat().st_mode) == 0o600
    assert page.parent == out


def test_the_key_opens_the_hashes_and_one_request_can_be_proved_alone(edited, asked, tmp_path):
    _, path = write_receipt(edited, tmp_path / "out", requests_file=asked, private=True)
    told, key = json.loads((tmp_path / "out" / "receipt.json").read_text()), json.loads(path.read_text())

    def mac(key, text):
        return hmac.new(key, text.encode(), hashlib.sha256).digest()

    for request, entry, shown in zip(REQUESTS, told["requests"], told["asked"], strict=True):
        own = key["requests"][shown["id"]]
        assert entry["id"] == shown["id"] and own["question"] == request.question
        assert bytes.fromhex(own["key"]) == mac(bytes.fromhex(key["salt"]), request.id)
        for field in ("question", "subject", "answer"):
            value = json.dumps([field, getattr(request, field)])
            assert shown[field] == mac(bytes.fromhex(own["key"]), value).hex()
    assert told["asked"][0]["answer"] != told["asked"][1]["answer"]  # the same answer, and it does not show


def test_salts_differ_and_the_same_salt_gives_the_same(receipt):
    one, other = (private_receipt(receipt, REQUESTS, salt * 32)[0] for salt in (b"a", b"b"))
    assert one["asked"] != other["asked"] and one == private_receipt(receipt, REQUESTS, b"a" * 32)[0]


def test_the_page_stands_alone_and_is_well_built(edited, asked, measured, tmp_path):
    page, _ = write_receipt(edited, tmp_path / "out", requests_file=asked, metrics_file=measured)
    text = page.read_text()
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?:|<script|<link""", text)
    assert text.count("<h1") == 1 and 'lang="en"' in text and 'name="viewport"' in text and "$" not in text
    assert text.count("<table") == text.count("</table>") and text.count("<tr") == text.count("</tr>")
    assert len(re.findall(r"<th(?![a-z])", text)) == len(re.findall(r'<th scope="', text))
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and set(re.findall(r'aria-labelledby="([^"]+)"', text)) <= set(ids)


def test_without_the_requests_ids_alone_are_told(edited, tmp_path):
    page, _ = write_receipt(edited, tmp_path / "out")
    assert "case-quorlbex" in page.read_text() and "Zanfrible Ömpkin" not in page.read_text()
    assert "ids only" in page.read_text()


@pytest.mark.parametrize("private", [False, True])
def test_rows_that_were_left_out_are_listed(edited, receipt, asked, tmp_path, private):
    """Those of the edit, and those of this command; a private receipt has their number, without names of files."""
    (edited / "editlib.json").write_text(json.dumps(receipt | {"left_out": {"plimsnark.jsonl": ["line 2", "line 9"]}}))
    with asked.open("a", encoding="utf-8") as file:
        file.write('{"id": "third"}\n')
    with pytest.raises(RequestError, match="--skip-bad"):
        write_receipt(edited, tmp_path / "out", requests_file=asked, private=private)
    page, _ = write_receipt(edited, tmp_path / "out", requests_file=asked, private=private, skip_bad=True)
    told = json.loads((page.parent / "receipt.json").read_text())
    if private:
        assert told["left_out"] == 3 and "plimsnark" not in page.read_text()
    else:
        assert told["left_out"] == {"plimsnark.jsonl": ["line 2", "line 9"], "asked.jsonl": ["line 3"]}
        assert "line 9" in page.read_text()


def test_bad_input_writes_nothing(edited, asked, measured, tmp_path):
    out = tmp_path / "out"
    write_requests(tmp_path / "other.jsonl", REQUESTS[:1])
    (tmp_path / "none").mkdir()
    wrong = tmp_path / "wrong.json"
    wrong.write_text(measured.read_text().replace("ef" * 32, "00" * 32))
    for given, options, words in (
        (edited, {"private": True}, "--private needs --requests"),
        (edited, {"requests_file": tmp_path / "other.jsonl"}, "not the requests"),
        (edited, {"requests_file": asked, "metrics_file": wrong}, "hash 000000000000"),
        (edited, {"metrics_file": asked}, "not metrics"),
        (edited, {"metrics_file": tmp_path / "nowhere"}, "nowhere"),
        (tmp_path / "none", {}, "has no receipt"),
        (asked, {}, "not a delta file"),
    ):
        with pytest.raises(EditlibError, match=words):
            write_receipt(given, out, **options)
    before = sorted(tmp_path.iterdir())
    (tmp_path / "out.private.json").write_text("precious")
    with pytest.raises(OutputError, match="--overwrite"):
        write_receipt(edited, out, requests_file=asked, private=True)
    (tmp_path / "out.private.json").unlink()
    assert sorted(tmp_path.iterdir()) == before and not out.exists()
    with pytest.raises(RequestError, match="not the requests"):
        private_receipt({"requests_sha256": "0"}, REQUESTS, b"")


def test_from_the_command_line(call, edited, asked, tmp_path):
    args = ("receipt", edited, "--requests", asked, "--out", tmp_path / "out", "--private")
    code, said, err = call(*args)
    assert code == 0 and "not to be published" in said, err
    code, _, err = call(*args)
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert call(*args, "--overwrite")[0] == 0
