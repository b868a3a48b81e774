"""The question that guides the pooling: found in a conversation or a prompt, and as ids of the guide's text tower; and
what a conversation may hold."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor


def check_text(name: str, text: str) -> None:
    """Raise a ValueError for a text with half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be valid text, got {text[error.start]!r} at character {error.start}; decode it as UTF-8 with "
            "errors='replace'"
        ) from None


def check_blocks(messages: Any, tokens: Sequence[str]) -> None:
    """A ValueError for a conversation with blocks that the model does not know, or `tokens` in a block of text."""
    messages = getattr(messages, "messages", messages)
    if not len(messages):
        raise ValueError("a conversation must have at least one message, got none; ask something")
    for message in messages:
        content = message.get("content")
        for block in () if content is None or isinstance(content, str) else content:
            kind = block.get("type") if isinstance(block, dict) else block
            if kind not in ("text", "image", "video", "image_url", "video_url"):  # transformers translates the last
                raise ValueError(
                    f"a block of a message must be of type text, image or video, got {kind!r}; the model knows "
                    "nothing else, leave it out"
                )
            for token in tokens:
                if token in (block.get("text") or ""):
                    raise ValueError(
                        f"a block of text must not hold {token}, which stands for a file; write it otherwise, and "
                        "pass files as blocks of their own"
                    )


def last_question(messages: Any) -> str:
    """The text of the last user turn of a conversation."""
    turns = [message for message in getattr(messages, "messages", messages) if message["role"] == "user"]
    content = turns[-1].get("content") or "" if turns else ""
    if isinstance(content, str):
        return content
    return "\n".join(block.get("text") or "" for block in content if block.get("type") == "text")


def last_turn(prompt: str, markers: Sequence[str] | None, placeholders: Sequence[str]) -> str:
    """What a rendered prompt has between the last of the first marker and the next of the second; all of it where there
    are no markers. Without placeholders."""
    if markers is not None:
        before, after = markers
        prompt = prompt.rpartition(before)[2].partition(after)[0]
    for placeholder in placeholders:
        prompt = prompt.replace(placeholder, "")
    return prompt.strip()


def check_questions(
    prompts: Sequence[str], guide_text: str | Sequence[str] | None, counts: Sequence[int], find: Callable[[str], str]
) -> list[str]:
    """The question of each prompt: `guide_text`, one for all or one each, or what `find` sees in the prompt.

    counts are the images and videos of each prompt; one without any need not ask.
    """
    if guide_text is None:
        guides = [find(prompt) for prompt in prompts]
    elif isinstance(guide_text, Iterable):
        guides = [guide_text] * len(prompts) if isinstance(guide_text, str) else list(guide_text)
    else:
        raise ValueError(f"guide_text must be a question, or one for each prompt, got {guide_text!r}; pass text")
    if len(guides) != len(prompts):
        raise ValueError(
            f"guide_text must be one question, or one for each of the {len(prompts)} prompts, got {len(guides)}"
        )
    for i, (guide, count) in enumerate(zip(guides, counts)):
        if not isinstance(guide, str):
            raise ValueError(f"guide_text must be text, got {guide!r} for prompt {i}; pass the question")
        check_text("guide_text", guide)
        if count and not guide.strip():
            raise ValueError(
                f"prompt {i} must ask something in the user's last turn, got images or videos alone; write a "
                "question, or pass guide_text"
            )
    return guides


def tokenize_questions(tokenizer: Any, questions: Sequence[str], limit: int, padding: str) -> dict[str, Tensor]:
    """guide_input_ids and, for padding "longest", guide_attention_mask [B, L]; a question that is too long for the
    `limit` positions of the guide keeps its start and EOS, with a warning."""
    rows = []
    for ids in tokenizer(list(questions), verbose=False)["input_ids"]:
        if len(ids) > limit:
            warnings.warn(
                f"guide_text of {len(ids)} tokens is longer than the {limit} of the guide: its last "
                f"{len(ids) - limit} tokens are lost; pass a shorter guide_text",
                stacklevel=3,
            )
            ids = [*ids[: limit - 1], ids[-1]]
        rows.append(ids)
    padded = tokenizer.pad(
        {"input_ids": rows},
        padding=padding,
        max_length=limit,
        padding_side="right",
        return_attention_mask=True,
        return_tensors="pt",
    )
    inputs = {"guide_input_ids": padded["input_ids"]}
    if padding == "longest":
        inputs["guide_attention_mask"] = padded["attention_mask"]
    return inputs


__all__ = ["check_blocks", "check_questions", "check_text", "last_question", "last_turn", "tokenize_questions"]
