"""Translation, summaries and whatever else an encoder-decoder says to what it reads."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from fastpt.data.batches import Batch
from fastpt.data.example import Example
from fastpt.data.translations import read_translation, targets_of, translation_example, translation_format
from fastpt.errors import ConfigError, ModelError
from fastpt.objectives.base import Prepare, Scorer
from fastpt.objectives.sft import CrossEntropy


class Seq2Seq(CrossEntropy):
    """Rows have `source` and `target`. The loss is the cross-entropy of the target's tokens, its closing one included."""

    task: ClassVar[str] = "seq2seq"
    needs_chat_template: ClassVar[bool] = False

    name: Literal["seq2seq"] = "seq2seq"  # type: ignore[assignment]
    prefix: str = Field("", description='what stands before each source, such as "translate English to German: "')
    generates: bool = Field(True, description="evaluations also answer each source and tell BLEU and chrF (sacrebleu)")
    max_new_tokens: int = Field(128, ge=1, description="most tokens of such an answer")
    beams: int = Field(1, ge=1, description="beams of such an answer; 1 is greedy")

    _tokenizer: Any = PrivateAttr(None)
    _start: int = PrivateAttr(0)

    def attach(self, model: Any, device: Any, dtype: Any) -> None:
        start = model.config.decoder_start_token_id if model.config.is_encoder_decoder else None
        if start is None:
            raise ModelError(
                f"{type(model).__name__} is no encoder-decoder with a decoder_start_token_id in its config: give a model such "
                "as T5, BART or Marian, or set it"
            )
        self._start = start
        if self.generates:
            _sacrebleu()

    def bind(self, tokenizer: Any, rows: Any, columns: dict[str, str] | None) -> Prepare:
        self._tokenizer = tokenizer
        row_format = translation_format(columns)

        def prepare(row: dict[str, Any], place: str) -> list[Example]:
            texts = read_translation(row, place, row_format)
            return [translation_example(tokenizer, texts, place, self.prefix, self._start)]

        return prepare

    def evaluate(self, model: Scorer, batch: Batch) -> dict[str, Any]:
        found = super().evaluate(model, batch)
        if not self.generates:
            return found
        assert batch.source is not None
        ids = batch.source.input_ids[0].tolist()
        sources = [ids[a:b] for a, b in pairwise(batch.source.cu_seqlens.tolist())]
        options = {"max_new_tokens": self.max_new_tokens, "num_beams": self.beams, "do_sample": False}
        said = self._tokenizer.batch_decode(model.answers(sources, **options), skip_special_tokens=True)
        return found | {"said": said, "wanted": targets_of(batch.fields)}

    def summarise(self, sums: dict[str, Any], count: float) -> dict[str, float]:
        texts = {name: sums[name] for name in ("said", "wanted") if name in sums}
        found = super().summarise({name: value for name, value in sums.items() if name not in texts}, count)
        if texts:
            bleu = _sacrebleu()
            references = [texts["wanted"]]
            found["bleu"] = bleu.corpus_bleu(texts["said"], references).score
            found["chrf"] = bleu.corpus_chrf(texts["said"], references).score
        return found


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError:
        raise ConfigError(
            "evaluations of seq2seq tell BLEU by the package sacrebleu: pip install 'fastpt[translation]', or set "
            "objective.generates=false"
        ) from None
    return sacrebleu
