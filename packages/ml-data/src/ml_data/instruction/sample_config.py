"""Flags that `ml-data instruct` and `ml-data preference` share, and what they come to."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ml_data import handlers
from ml_data.account import OnError
from ml_data.destination import Destination
from ml_data.handlers import dataset_info
from ml_data.handlers.dataset_info import Dataset
from ml_data.instruction.mixing import MixStrategy
from ml_data.instruction.preparation import Preparation
from ml_data.instruction.sample_encoding import SampleEncoding
from ml_data.instruction.samples import Limits, OnTooLong
from ml_data.reading import find_files
from ml_data.tokenizer import TokenizerConfig
from ml_models.flags import UsageError


@dataclass(frozen=True, kw_only=True)
class Source:
    """Input."""

    input: tuple[str, ...]
    """Files, directories, patterns; with LlamaFactoryInstructionHandler names of datasets."""
    handler_name: str
    """What records look like, by ModelLink's names: AlpacaStyleInstructionHandler,
    SharegptStylePairwiseHandler, ...; a name that does not exist lists them."""
    map_keys: str | None = None
    """Names of columns and tags, JSON: '{"prompt": "question", "response": "answer"}'."""
    dataset_dir: str | None = None
    """Directory of the dataset_info.json that names datasets of LlamaFactoryInstructionHandler."""
    max_samples: int | None = None
    """Take only the first so many records of each dataset."""

    def __post_init__(self) -> None:
        if not self.input:
            raise ValueError("--input needs at least one value")
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"--max-samples {self.max_samples}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Several datasets."""

    mix_strategy: MixStrategy = "concat"
    """One after the other, or interleaved: until the first (under) or the last (over) has ended.
    Each --input is a dataset."""
    interleave_probs: tuple[float, ...] | None = None
    """Probability of each dataset to give the next record; without it they take turns."""
    seed: int = 1234
    """Of the draws with --interleave-probs."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: must be at least 0")

    def check(self, datasets: int) -> None:
        """Compare the probabilities with the number of datasets.

        Raises:
            UsageError: they do not fit.
        """
        given = self.interleave_probs
        if given is None:
            return
        shown = f"--interleave-probs {' '.join(map(str, given))}"
        if self.mix_strategy == "concat":
            raise UsageError(f"{shown}: needs --mix-strategy interleave_under or interleave_over")
        if len(given) != datasets:
            raise UsageError(f"{shown}: {len(given)} values for {datasets} datasets of --input")
        if any(value <= 0 for value in given) or abs(sum(given) - 1) > 1e-8:
            raise UsageError(f"{shown}: must all be above 0 and sum to 1, not {sum(given):g}")


@dataclass(frozen=True, kw_only=True)
class Template:
    """Template."""

    prompt_type: str | None = None
    """Name of a template, or path of its file."""
    hf_chat_template: bool = False
    """Take the chat template that comes with the tokenizer."""

    def check(self, datasets: tuple[Dataset, ...]) -> None:
        """Compare with the handlers: those with a form of their own take no template.

        Raises:
            UsageError: a template is missing, or there is one too many.
        """
        if self.prompt_type is not None and self.hf_chat_template:
            raise UsageError("--prompt-type and --hf-chat-template: only one of them")
        given = self.prompt_type is not None or self.hf_chat_template
        own = [d.handler for d in datasets if handlers.HANDLERS[d.handler].chat_format is not None]
        if own and given:
            flag = "--hf-chat-template" if self.hf_chat_template else "--prompt-type"
            raise UsageError(f"{flag}: {own[0]} has its own form, and takes no template")
        if not own and not given:
            raise UsageError(f"missing --prompt-type, or --hf-chat-template: {datasets[0].handler}")


@dataclass(frozen=True, kw_only=True)
class SampleShape:
    """Samples."""

    seq_length: int | None = None
    """The most tokens of a sample."""
    on_too_long: OnTooLong = "cut"
    """Longer ones: cut at whole turns, or leave out. Both are counted."""
    append_eod: bool = False
    """End every sample with the end-of-text token, that of the template if it has its own."""

    def __post_init__(self) -> None:
        if self.seq_length is not None and self.seq_length < 2:
            raise ValueError(f"--seq-length {self.seq_length}: must be at least 2")


@dataclass(frozen=True, kw_only=True)
class Output(Destination):
    """Output."""

    output_prefix: str
    """The datasets are PREFIX_packed_..._document.bin and .idx, described in PREFIX_packed.json."""
    on_error: OnError = "stop"
    """A record that is not what its format says: end with its place, or count it and go on."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The groups of flags of both commands."""

    source: Source
    mixing: Mixing = Mixing()
    tokenization: TokenizerConfig
    template: Template = Template()
    shape: SampleShape = SampleShape()
    output: Output

    def preparation(
        self, *, pairwise: bool, pack: bool = False, last_answer_only: bool = False
    ) -> Preparation:
        """Return what is to be done.

        Raises:
            UsageError: values contradict each other, or name what is not there.
        """
        datasets = _datasets(self.source, pairwise=pairwise)
        self.mixing.check(len(datasets))
        self.template.check(datasets)
        encoding = SampleEncoding(
            tokenizer=self.tokenization,
            template=self.template.prompt_type,
            datasets=datasets,
            limits=Limits(
                seq_length=self.shape.seq_length,
                on_too_long=self.shape.on_too_long,
                last_answer_only=last_answer_only,
            ),
            append_eod=self.shape.append_eod,
        )
        return Preparation(
            encoding=encoding,
            output_prefix=self.output.output_prefix,
            pack=pack,
            mix_strategy=self.mixing.mix_strategy if len(datasets) > 1 else "concat",
            interleave_probs=self.mixing.interleave_probs,
            seed=self.mixing.seed,
            on_error=self.output.on_error,
            workers=self.output.processes,
        )


def _datasets(source: Source, *, pairwise: bool) -> tuple[Dataset, ...]:
    name = source.handler_name
    if name == handlers.LLAMA_FACTORY:
        if source.map_keys is not None:
            raise UsageError(f"--map-keys: {dataset_info.FILE} names the columns")
        found = dataset_info.datasets(source.input, source.dataset_dir, pairwise=pairwise)
    else:
        handler = handlers.find(name, pairwise=pairwise)
        if source.dataset_dir is not None:
            raise UsageError(
                f"--dataset-dir {source.dataset_dir}: is read with --handler-name "
                f"{handlers.LLAMA_FACTORY} only, not {name}"
            )
        columns = handlers.columns_of(handler, source.map_keys)
        found = [Dataset(input=(path,), handler=name, columns=columns) for path in source.input]
    return tuple(
        replace(
            dataset.limited(source.max_samples),
            input=tuple(str(path) for path in find_files(dataset.input)),
        )
        for dataset in found
    )
