"""What two processes do under torchrun for `test_stats_distributed.py`; each writes what it saw to its own file."""

import contextlib
import io
import json
import logging
import sys
from pathlib import Path

from editlib import cli, distributed
from editlib.distributed import processes
from editlib.errors import CorpusError
from editlib.models.loading import load
from editlib.stats import moments
from editlib.stats.corpus import load_corpus
from editlib.stats.file import StatsHeader
from editlib.stats.layer_stats import layer_stats
from editlib.stats.self_stats import self_stats
from editlib.stats.store import save_stats
from editlib.workbench import Workbench

PROMPTS = ["What is the capital of France?", "Tell me about the river Rhine.", "Who are you?"]
SELF = {"tokens": 300, "seed": 5, "batch_rows": 4, "length": 12, "progress": False}
CORPUS = {"tokens": 3000, "max_length": 32, "batch_tokens": 200, "progress": False}


class Cut(Exception):
    pass


def header(corpus: str, d_ff: int, part: str) -> StatsHeader:
    return StatsHeader(part, "", d_ff, 0, 0, corpus, "", 32, 1)


def command(*args: str) -> dict:
    """What `editlib` prints and leaves with in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["editlib", *args]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    return {"out": out.getvalue(), "err": err.getvalue(), "code": code}


def main() -> None:
    folder, corpus, out = sys.argv[1:]
    asked = ("--corpus", corpus, "--tokens", "9001", "--stats-dir", f"{out}/command")
    moments.SAVING = 1e9
    distributed.PIECE = 1000  # so that sums travel in several pieces, the last one smaller
    with processes() as shard:  # once: the commands inside find a group and use it
        good, bad = (command("stats", folder, "--layers", layers, *asked) for layers in ("2-3", "9"))
        log = io.StringIO()
        logging.getLogger("editlib").addHandler(logging.StreamHandler(log))
        logging.getLogger("editlib").setLevel(logging.INFO)
        saw: dict = {"rank": shard.rank, "world": shard.world, "good": good, "bad": bad}
        bench = Workbench.of(*load(folder), out, name="tiny", shard=shard)
        saw["progress"] = bench.progress
        anat, tok, documents = bench.anat, bench.tok, load_corpus(corpus).documents

        def corpus_stats(part, texts, **options):
            head = header("c", anat.d_ff, part)
            return layer_stats(anat, tok, [1, 3], texts, header=head, shard=shard, **CORPUS, **options)

        def self_made(part, **options):
            head = header("self", anat.d_ff, part)
            return self_stats(anat, tok, [1, 3], PROMPTS, header=head, shard=shard, **SELF, **options)

        def keep(made):
            for one in made.values() if shard.first else ():
                save_stats(Path(out), one)
            return {layer: [one.count, one.sha256()] for layer, one in made.items()}

        def until(number, error):
            for i, text in enumerate(documents):
                if i == number:
                    raise error
                yield text

        # Both are cut behind some batches, and go on.
        place = Path(out) / "corpus.npz"
        with contextlib.suppress(Cut):
            corpus_stats("corpus", until(6, Cut()), checkpoint=place, checkpoint_seconds=-1)
        saw["checkpoint"] = shard.own(place).exists()
        saw["corpus"] = keep(corpus_stats("corpus", documents, checkpoint=place))
        saw["resumed"] = "resuming after" in log.getvalue()

        # One meets a bad line, none waits for it.
        try:
            corpus_stats("bad", until(6, CorpusError("line 7 is bad")) if shard.rank else documents)
        except CorpusError as error:
            saw["error"] = str(error)

        # The model's own text; then with checkpoints that agree, then with one that is lost.
        saw["self"] = keep(self_made("self", checkpoint=Path(out) / "self.npz", checkpoint_seconds=-1))
        saw["self again"] = keep(self_made("self", checkpoint=Path(out) / "self.npz"))
        if shard.first:
            shard.own(Path(out) / "self.npz").unlink()
        saw["self, one lost"] = keep(self_made("self", checkpoint=Path(out) / "self.npz"))
        saw["said"] = "stop at different batches" in log.getvalue()

        (Path(out) / f"saw.{shard.rank}.json").write_text(json.dumps(saw))


if __name__ == "__main__":
    main()
