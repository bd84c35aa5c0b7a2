"""A JSON data file as a map-style torch data set: each item a sample at one stage of the curriculum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from coconut.data.encode import SampleEncoder
from coconut.data.image import ImageProcessor
from coconut.data.sample import read_samples, sample_from_record
from coconut.data.stage_text import build_prompt_template, stage_spec
from coconut.types import PromptTemplate, Sample, StageSpec
from coconut.utils.tokenizer import special_token_ids

#: Pixels of a tile's side that become one image token, in each direction: patch 14, pixel shuffle 0.5.
_PIXELS_PER_TOKEN = 28


class MultimodalDataset(Dataset[dict[str, Any]]):
    """Samples of a JSON or JSONL file, encoded one by one when asked for.

    Args:
        data_path: the file; see `coconut.data.sample` for its records.
        tokenizer: from `load_tokenizer`: it has the three latent tokens.
        image_processor: makes the tiles; None for text-only data.
        max_size: use no more than so many records.
        image_root: folder of the images; None is the folder of the data file.
        template: how prompts are written; None takes the tokenizer's chat template, or else plain text.
        tokens_per_patch: image tokens a tile takes; None is InternVL's, 256 for 448 x 448.
        spec: the stage of the items; None is stage 0, every step written out.
        max_length: longest allowed item in tokens; None for no limit.

    Raises:
        DataError: naming every faulty record or missing image at once; a tokenizer without latent tokens.
    """

    def __init__(
        self,
        data_path: str | Path,
        tokenizer: Any,
        image_processor: ImageProcessor | None,
        max_size: int | None = None,
        image_root: str | Path | None = None,
        *,
        template: PromptTemplate | None = None,
        tokens_per_patch: int | None = None,
        spec: StageSpec | None = None,
        max_length: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.ids: tuple[int, int, int] = special_token_ids(tokenizer)
        self.data_path = Path(data_path)
        self.image_root = Path(image_root) if image_root is not None else Path(data_path).parent
        self.samples: list[Sample] = read_samples(data_path, image_root=self.image_root, max_size=max_size)
        if tokens_per_patch is None:
            tokens_per_patch = (image_processor.image_size // _PIXELS_PER_TOKEN) ** 2 if image_processor else 0
        self.encoder = SampleEncoder(
            tokenizer, image_processor, template or build_prompt_template(tokenizer), tokens_per_patch, max_length
        )
        self.spec = spec or stage_spec(0)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Features of one sample (see `coconut.data.encode`): pixel_values uint8 [patches, 3, H, W] or None,
        input_ids, attention_mask, labels int64 [L], num_patches, and "key", "text", "sample" beside them."""
        return self._features(self.read(index))

    def key(self, index: int) -> str:
        return self.samples[index].key

    def locate(self, index: int) -> tuple[str, str]:
        """The data file and the sample's key."""
        return str(self.data_path), self.key(index)

    def read(self, index: int) -> Sample:
        """The sample itself, its images as paths."""
        return self.samples[index]

    def tokenize_multimodal_sample(self, sample: dict[str, Any] | Sample) -> dict[str, Any]:
        """Features of a raw record (question, steps, answer, image), as an item of this data set.

        Raises:
            DataError: a field is missing, or the image cannot be read.
        """
        if not isinstance(sample, Sample):
            record_key = str(sample.get("id", "record"))
            sample = sample_from_record(sample, key=record_key, source="record", image_root=self.image_root)
        return self._features(sample)

    def _features(self, sample: Sample) -> dict[str, Any]:
        return self.encoder.with_stage(self.encoder.encode(sample), self.spec, self.ids)
