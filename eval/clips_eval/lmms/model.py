"""The MLLM as an lmms-eval model: `--model clips_mllm`, or an object for `simple_evaluate`.

    requests --read--> Documents --sort by length--> batches --features once per image--> generate --> answers
                                                                                            (in request order)

Shapes: N documents of a batch, T prompt tokens (left-padded), P tokens per image, D width of the language model.
"""

from __future__ import annotations

import copy
import json
import os
from typing import TYPE_CHECKING, Any, get_args

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from clips_eval.lmms.answer_cache import AnswerCache
from clips_eval.lmms.batches import Document, batches, expand, generation_options, left_pad, shuffle_images, truncate
from clips_eval.lmms.prefix import generate_inputs, shared_prefixes
from clips_eval.lmms.requests import (
    Control,
    Prompt,
    chat_prompt,
    document_of,
    options_of,
    request_name,
    simple_prompt,
    task_names,
)
from clips_mllm.model.image_features import FeatureCache, encoder_output
from clips_mllm.model.processors import IMAGE_INPUTS
from clips_mllm.model.quantize import Quantize
from clips_mllm.prompts.conversation import EMPTY_THOUGHTS
from clips_mllm.prompts.render import tokenizer_options
from vision_tower.common.errors import UserError
from vision_tower.common.hashes import image_hash
from vision_tower.common.launcher import is_main_process

if TYPE_CHECKING:
    from PIL.Image import Image

    from clips_mllm.model.checkpoint import Mllm


class ClipsMllm(lmms):
    """A stock LLaVA checkpoint in lmms-eval's chat mode, batched.

    Args:
        pretrained: folder or hub id of the checkpoint; not used if `mllm` is given.
        mllm: a loaded model.
        batch_size: documents per batch.
        device, dtype, quantize: arguments of `clips_mllm.model.checkpoint.load_mllm`.
        control: images shown instead of a document's, to measure language prior: "shuffled" those of another
            document, "blank" images of the mean color, "no_image" none.
        seed: seed of the shuffled control.
        cache_gb: CPU memory for image features.
        answers: cache of answers on disk.
    Raises:
        UserError: an invalid argument, or a checkpoint that cannot be loaded.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        mllm: Mllm | None = None,
        batch_size: int | str = 1,
        device: str = "auto",
        dtype: str = "auto",
        quantize: Quantize = "none",
        control: Control = "none",
        seed: int = 0,
        cache_gb: float = 2.0,
        answers: AnswerCache | None = None,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("control", control, get_args(Control)),
            ("quantize", quantize, get_args(Quantize)),
        ):
            if value not in choices:
                raise UserError("unknown value", key=name, value=value, remedy=f"choose from {', '.join(choices)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError("must be an integer of at least 1", key="batch_size", value=batch_size)
        self.mllm = mllm or _load(pretrained, device, dtype, quantize)
        if not self.mllm.processor.chat_template:
            raise UserError("the processor has no chat template", file=pretrained, remedy="add chat_template.jinja")
        self.batch_size = int(batch_size)
        self.control: Control = control
        self.seed = seed
        self.features = FeatureCache(int(cache_gb * 2**30))
        self.answers = answers
        self.images: dict[tuple[str, int], list[str]] = {}  # digests by document, before the shuffled control
        self._sources: dict[str, tuple[Instance, int]] = {}  # request and index to read an image again

    @property
    def device(self) -> torch.device:
        """Device on which lmms-eval gathers the counts of several processes."""
        return self.mllm.device

    def clean(self) -> None:
        """Keep the weights, which lmms-eval deletes after every `simple_evaluate`: they are the caller's."""

    @torch.no_grad()  # not inference_mode: ZeRO-3 cannot train with weights that it gathered there
    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the answers in the order of the requests.

        Raises:
            UserError: a document that cannot be read; the message names it.
        """
        quiet, tasks = not is_main_process(), task_names(requests)
        documents = [self._read(request) for request in tqdm(requests, f"{tasks}: reading", unit="doc", disable=quiet)]
        if self.control == "shuffled":
            documents = self._shuffled(documents, requests)
        answers = self._cached(documents)
        missing = [index for index in range(len(documents)) if index not in answers]
        bar = tqdm(total=len(documents), initial=len(answers), desc=f"{tasks}: answering", unit="doc", disable=quiet)
        with bar:
            for batch in batches([documents[index] for index in missing], self.batch_size):
                indices = [missing[position] for position in batch]
                texts = self._answer([documents[index] for index in indices])
                answers.update(zip(indices, texts, strict=True))
                if self.answers is not None:
                    self.answers.add({documents[index].key: answers[index] for index in indices})
                bar.update(len(indices))
        return [answers[index] for index in range(len(documents))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("clips_mllm generates answers; choose a task with output_type generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("clips_mllm answers a single turn; choose a task with output_type generate_until")

    def _cached(self, documents: list[Document]) -> dict[int, str]:
        """Return the cached answers by index."""
        if self.answers is None:
            return {}
        cached = {index: self.answers.get(document.key) for index, document in enumerate(documents)}
        return {index: answer for index, answer in cached.items() if answer is not None}

    def _prompt(self, request: Instance) -> Prompt:
        """Return the prompt and images of a request under the control."""
        document = document_of(request, self.task_dict)
        render = simple_prompt if self.is_simple else chat_prompt
        return render(request, document, self.mllm.processor, self.control)

    def _read(self, request: Instance) -> Document:
        _, _, _, doc_id, task, _ = request.args
        prompt = self._prompt(request)
        processor = self.mllm.processor
        options = tokenizer_options(prompt.text, processor.tokenizer)
        ids = processor.tokenizer(prompt.text, **options)["input_ids"]
        if ids.count(processor.image_token_id) != len(prompt.images):
            raise UserError(
                f"{ids.count(processor.image_token_id)} '{processor.image_token}' in the prompt but "
                f"{len(prompt.images)} images",
                file=request_name(request),
                remedy="remove the placeholder from the document's text or fix the chat template",
            )
        digests = [image_hash(image) for image in prompt.images]
        self.images[task, doc_id] = digests
        for index, digest in enumerate(digests):
            self._sources.setdefault(digest, (request, index))
        settings = json.dumps(generation_options(options_of(request, simple=self.is_simple)), sort_keys=True)
        return Document(task=task, doc_id=doc_id, ids=ids, images=digests, options=settings)

    def _shuffled(self, documents: list[Document], requests: list[Instance]) -> list[Document]:
        """Exchange images within each task, over the documents of all processes."""
        if self.world_size == 1:
            return shuffle_images(documents, self.seed)
        own = {digest: (request.args[3], index) for digest, (request, index) in self._sources.items()}
        shares: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(shares, (documents, own))
        one_of = {request.args[4]: request for request in requests}
        for others, sources in shares:
            for document in others:
                for digest in document.images:
                    doc_id, index = sources[digest]
                    self._sources.setdefault(digest, (_with_document(one_of[document.task], doc_id), index))
        everywhere = [document for others, _ in shares for document in others]
        start = sum(len(others) for others, _ in shares[: self.rank])
        return shuffle_images(everywhere, self.seed)[start : start + len(documents)]

    def _answer(self, batch: list[Document]) -> list[str]:
        features = self._image_features([digest for document in batch for digest in document.images])
        prompts = [expand(document, features, self.mllm.processor.image_token_id) for document in batch]
        tokenizer = self.mllm.processor.tokenizer
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        options: dict[str, Any] = json.loads(batch[0].options)
        until = options.pop("until")
        if until:
            options.update(stop_strings=until, tokenizer=tokenizer)
        model = self.mllm.model
        shared = shared_prefixes(batch, prompts, self.mllm.processor.image_token_id, options)
        if shared is not None:
            shown = [features[digest] for index in shared.first for digest in batch[index].images]
            inputs = generate_inputs(model, prompts, shared, encoder_output(shown), pad)
        else:
            ids, mask = left_pad(prompts, pad)
            inputs = {"input_ids": ids.to(self.mllm.device), "attention_mask": mask.to(self.mllm.device)}
            if features:
                shown = [features[digest] for document in batch for digest in document.images]
                inputs["mm_encoder_outputs"] = {"image": encoder_output(shown)}
        output = model.generate(**inputs, pad_token_id=pad, **options)
        width = inputs["input_ids"].shape[1]
        texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        return [truncate(text.removeprefix(EMPTY_THOUGHTS), until) for text in texts]

    def _image_features(self, digests: list[str]) -> dict[str, torch.Tensor]:
        """Return projected features of each distinct image, (P, D) on the model's device."""
        return self.features.get_or_encode(digests, self._encode, self.mllm.device)

    def _encode(self, digests: list[str]) -> list[torch.Tensor]:
        model, images = self.mllm.model, [self._image_of(digest) for digest in digests]
        processed = self.mllm.processor.image_processor(images, return_tensors="pt")
        inputs = {name: processed[name].to(self.mllm.device) for name in IMAGE_INPUTS if name in processed}
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        return list(model.get_image_features(**inputs, return_dict=True).pooler_output)

    def _image_of(self, digest: str) -> Image:
        request, index = self._sources[digest]
        return self._prompt(request).images[index]


class ClipsMllmSimple(ClipsMllm):
    """ClipsMllm in lmms-eval's simple mode, for tasks without chat mode and for comparisons with stock models."""

    is_simple = True


def _with_document(request: Instance, doc_id: int) -> Instance:
    """Return a copy of the request for another document, whose image another process has read."""
    other = copy.copy(request)
    arguments = list(request.args)
    arguments[3] = doc_id
    other.arguments = tuple(arguments)
    return other


def _load(pretrained: str | None, device: str, dtype: str, quantize: Quantize) -> Mllm:
    if pretrained is None:
        raise UserError("is missing", key="pretrained", remedy="give --model_args pretrained=FOLDER")
    return load_own(pretrained, device=device, dtype=dtype, quantize=quantize)


def load_own(checkpoint: str, *, device: str, dtype: str, quantize: Quantize) -> Mllm:
    """Load a checkpoint for our engine, in this command and in lmms-eval's own.

    Args:
        device, dtype, quantize: arguments of `clips_mllm.model.checkpoint.load_mllm`; auto is this process's GPU.
    Raises:
        UserError: a checkpoint that cannot be loaded.
    """
    from clips_mllm.model.checkpoint import load_mllm

    return load_mllm(checkpoint, device=own_device(device), dtype=dtype, quantize=quantize)


def own_device(device: str) -> str:
    """Return the GPU of this process under `accelerate launch` (untested on GPUs), else `device`."""
    if device == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device
