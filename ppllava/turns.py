"""A question about files as the chat template of a model writes it. A template is a program, so its time is bounded."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .processing_ppllava import PPLlavaProcessor

SECONDS = 10.0  # of the process's time on its cores; templates take milliseconds


def render_turn(processor: PPLlavaProcessor, kinds: Sequence[str], question: str) -> str:
    """The prompt of one user turn: a placeholder for each file of these kinds, "image" or "video", and the question.

    Raises:
        TimeoutError: where the template does not end (:func:`time_limit`). Else what the template raises.
    """
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": question}]
    with time_limit(SECONDS):
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )


def special_tokens(processor: PPLlavaProcessor, text: str) -> dict[str, bool]:
    """How the tokenizer is to take a rendered prompt. A template may have written the first token; transformers'
    apply_chat_template decides in the same way."""
    start = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if start is not None and text.startswith(start) else {}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError in the block after so many seconds of CPU time, waiting not counted.

    The clock is a signal, which Python sees in the main thread and between two of its own instructions: in other
    threads, on Windows, and within one long instruction, as the power of a huge number, nothing bounds the block.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"it has not ended after {seconds:g} s")

    handler = signal.signal(signal.SIGVTALRM, stop)  # SIGALRM may be the caller's
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)


__all__ = ["render_turn", "special_tokens", "time_limit"]
