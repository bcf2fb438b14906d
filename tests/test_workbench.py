"""What is kept once for a model: found again, and kept apart from what belongs to other weights of it."""

import pytest

from editlib.algorithms.unierase.token_learning import TokenHyperParams
from editlib.errors import TokenError
from editlib.workbench import Workbench

FEW = TokenHyperParams(steps=2, robust_steps=0, batch=2, guard_prompts=2)


def test_each_dtype_has_a_token_of_its_own(folder, tmp_path):
    """The token of a bf16 model took the place of the fp32 one's, or was refused."""
    wide = Workbench.load(str(folder), tmp_path / "stats", progress=False)
    wide.make_token(hparams=FEW)
    first = wide.token_path
    kept = first.read_bytes()
    narrow = Workbench.load(str(folder), tmp_path / "stats", dtype="bfloat16", progress=False)
    assert narrow.token_path != first and not narrow.token_path.exists()
    made = narrow.make_token(hparams=FEW)
    assert first.read_bytes() == kept
    assert narrow.find_or_make_token().row_in.tolist() == made.row_in.tolist()
    again = Workbench.load(str(folder), tmp_path / "stats", progress=False)
    assert again.token_path == first
    assert again.find_or_make_token().header.model_sha256 == again.sha256
    with pytest.raises(TokenError, match="another --dtype, revision or edit"):
        again.find_or_make_token(narrow.token_path)
