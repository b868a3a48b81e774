"""The chat templates that the original was trained with, and what surrounds a user's turn in them."""

_BLOCKS = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}<image>\n"
    "{% elif block['type'] == 'video' %}<video>\n"
    "{% elif block['type'] == 'text' %}{{ block['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
)

# SYSTEM USER: <video>\nQUESTION ASSISTANT: ANSWER</s>USER: ... The space after the last colon is a token of its own.
VICUNA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}ASSISTANT: {% generation %}"
    + _BLOCKS
    + "{{ eos_token }}{% endgeneration %}"
    "{% else %}{% if message['role'] == 'user' %}USER: {% endif %}" + _BLOCKS + " {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
VICUNA_MARKERS = ("USER:", "ASSISTANT:")

QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}" + _BLOCKS + "<|im_end|>{% endgeneration %}\n"
    "{% else %}" + _BLOCKS + "<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_MARKERS = ("<|im_start|>user\n", "<|im_end|>")

__all__ = ["QWEN_MARKERS", "QWEN_TEMPLATE", "VICUNA_MARKERS", "VICUNA_TEMPLATE"]
