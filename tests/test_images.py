"""Images through the processor and the model: every form, views, lists, mixed batches, and wrong input."""

import base64
import copy
import io
import re

import numpy as np
import pytest
import torch
from golden_data import close
from PIL import Image
from tiny import attended, clip
from transformers import pipeline
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from ppllava import presets
from ppllava.pooling import VisualPooling

ONE = "USER: <image>\nWhat is it? ASSISTANT: "
TWO = "USER: <image>\n<image>\nWhich is older? ASSISTANT: "
VIDEO = "USER: <video>\nWhat happens? ASSISTANT: "
PRESETS = ("tiny", "tiny-btadapter", "tiny-qwen2")


@pytest.fixture(scope="module")
def built():
    return {name: presets.build(name) for name in PRESETS}


@pytest.fixture(scope="module")
def processor(built):
    return built["tiny"][1]


def picture(width=60, height=40, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)  # no detail below a patch
    return Image.fromarray(pixels).resize((width, height), Image.BICUBIC)


def saved(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


FORMS = {
    "PIL": lambda x: x,
    "numpy": np.asarray,
    "channels first": lambda x: np.asarray(x).transpose(2, 0, 1),
    "torch": lambda x: torch.from_numpy(np.array(x)),
    "torch channels first": lambda x: torch.from_numpy(np.array(x)).permute(2, 0, 1),
    "list": lambda x: [x],
    "nested by prompt": lambda x: [[x]],
    "base64": lambda x: base64.b64encode(saved(x)).decode(),
    "RGBA": lambda x: x.convert("RGBA"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_image(form, processor):
    inputs, expected = processor(text=ONE, images=FORMS[form](picture())), processor(text=ONE, images=picture())
    assert all(torch.equal(inputs[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_files(kind, tmp_path, processor):
    path = tmp_path / "picture.png"
    path.write_bytes(saved(picture()))
    inputs = processor(text=ONE, images=kind(path))
    assert torch.equal(inputs["pixel_values"], processor(text=ONE, images=picture())["pixel_values"])
    chat = [
        {"role": "user", "content": [{"type": "image", "path": str(path)}, {"type": "text", "text": "What is it?"}]}
    ]
    again = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert all(torch.equal(again[name], value) for name, value in inputs.items())


def test_sixteen_bits(tmp_path, processor):
    levels = np.linspace(0, 65535, 42 * 42).reshape(42, 42).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    expected = processor.preprocess_image(Image.fromarray((levels >> 8).astype(np.uint8)), views=False)
    for image in (tmp_path / "deep.png", Image.fromarray(levels)):
        close(processor.preprocess_image(image, views=False), expected, 0.02)
    close(processor.preprocess_video([Image.fromarray(levels)]), expected, 0.02)


def test_a_photo_is_turned_upright(tmp_path, processor):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    picture(60, 40).save(tmp_path / "turned.jpg", exif=exif)
    assert processor(text=ONE, images=tmp_path / "turned.jpg")["image_sizes"].tolist() == [[60, 40]]


@pytest.mark.parametrize(
    "size", [(42, 42), (100, 42), (42, 100), (500, 20), (20, 500), (1, 1), (1000, 1), (84, 84), (83, 85)]
)
def test_placeholders_are_the_tokens_of_the_model(size, built):
    for model, processor in built.values():
        inputs = processor(text=ONE, images=picture(*size))
        [tokens] = model.get_image_features(
            **{k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
        ).pooler_output
        assert int((inputs["input_ids"] == processor.image_token_id).sum()) == len(tokens)
        assert processor.num_image_tokens(size[1], size[0]) == len(tokens)
        assert model(**inputs).logits.isfinite().all()


def test_views_are_those_of_llava_next(processor):
    reference = LlavaNextImageProcessorPil(
        size={"shortest_edge": 42},
        crop_size={"height": 42, "width": 42},
        image_grid_pinpoints=processor.image_grid_pinpoints,
    )
    for size in ((100, 42), (50, 90), (30, 31)):
        expected = reference(picture(*size), return_tensors="pt")["pixel_values"][0]
        close(processor.preprocess_image(picture(*size)), expected, 1e-5)


def test_the_views_of_an_image_list_are_one_each(processor):
    inputs = processor(text=TWO, images=[picture(100, 42), picture(30, 90, 1)])
    assert inputs["image_views"].tolist() == [1, 1]
    assert inputs["image_groups"].tolist() == [2]
    assert inputs["image_sizes"].tolist() == [[42, 100], [90, 30]]
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 2 * 4
    assert len(inputs["guide_input_ids"]) == 1
    squashed = processor.preprocess_video(np.asarray(picture(100, 42))[None])
    assert torch.equal(inputs["pixel_values"][:1], squashed)


def test_without_pinpoints_an_image_is_one_view(processor):
    other = presets.build_processor(presets.preset_config("tiny"))
    other.image_grid_pinpoints = []
    inputs = other(text=ONE, images=picture(100, 42))
    assert inputs["image_views"].tolist() == [1]
    assert other.num_image_tokens(42, 100) == int((inputs["input_ids"] == 4).sum()) == 5


TEXTS = [
    ONE,
    VIDEO,
    TWO,
    "USER: Hello ASSISTANT: ",
    "USER: <image>\n then <video>\n and <image>\n What next? ASSISTANT: ",
]


def mixed(processor, only=None, **kwargs):
    """A batch of every kind of prompt, or one of it."""
    images = [
        [picture(100, 42)],
        [],
        [picture(30, 90, 1), picture(50, 50, 2)],
        [],
        [picture(42, 42, 3), picture(9, 9, 4)],
    ]
    videos = [[], [clip(5)], [], [], [clip(1, seed=1)]]
    chosen = range(len(TEXTS)) if only is None else [only]
    flat_images, flat_videos = ([x for i in chosen for x in media[i]] for media in (images, videos))
    return processor(text=[TEXTS[i] for i in chosen], images=flat_images or None, videos=flat_videos or None, **kwargs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_mixed_batch_is_each_prompt_alone(name, side, built):
    """In float64: products of other sizes round in other ways, which the temperature of 0.01 amplifies."""
    model, processor = copy.deepcopy(built[name][0]).double(), built[name][1]
    inputs = mixed(processor, padding_side=side).to(torch.float64)
    assert inputs["image_groups"].tolist() == [1, 2, 2]
    assert len(inputs["guide_input_ids"]) == 3 + 2
    with torch.no_grad():
        for i, row in enumerate(attended(inputs, model(**inputs).logits)):
            close(row, model(**mixed(processor, only=i).to(torch.float64)).logits[0], 1e-9)


@pytest.mark.parametrize("name", PRESETS)
def test_a_mixed_batch_generates_what_each_prompt_does(name, built):
    model, processor = built[name]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    ids = model.generate(**mixed(processor), **options)[:, -6:]
    for i in range(len(TEXTS)):
        assert torch.equal(model.generate(**mixed(processor, only=i), **options)[0, -6:], ids[i])


def test_the_order_of_media_in_a_prompt_is_that_of_the_text(built):
    model, processor = built["tiny"]
    text = "USER: <image>\n<image>\nWhich? ASSISTANT: "
    logits = [
        model(**processor(text=text, images=[picture(seed=a), picture(seed=b)])).logits for a, b in ((0, 1), (1, 0))
    ]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_pipeline(built):
    model, processor = built["tiny"]
    talk = pipeline("image-text-to-text", model=model, processor=processor)
    content = [
        {"type": "image", "image": picture()},
        {"type": "video", "video": clip(4)},
        {"type": "text", "text": "What is it?"},
    ]
    chat = [{"role": "user", "content": content}]
    out = talk(text=chat, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_full_text=False)
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out[0]["generated_text"] == processor.decode(ids[0, -4:], skip_special_tokens=True)


def test_media_in_several_turns(built):
    model, processor = built["tiny"]

    def user(*blocks):
        return {"role": "user", "content": list(blocks)}

    def text(words):
        return {"type": "text", "text": words}

    image, video = {"type": "image", "image": picture(100, 42)}, {"type": "video", "video": clip(4)}
    first = user(text("Before "), image, text("this"))
    chat = [first, {"role": "assistant", "content": [text("I see.")]}, user(video, text("And now?"))]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    inputs = processor.apply_chat_template(chat, **options)
    rendered = "USER: Before <image>\nthis ASSISTANT: I see.</s>USER: <video>\nAnd now? ASSISTANT: "
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == rendered
    expected = processor(text=rendered, images=picture(100, 42), videos=clip(4), guide_text="And now?")
    assert all(torch.equal(inputs[name], value) for name, value in expected.items())
    with torch.no_grad():
        both = processor.apply_chat_template([chat, [user(text("Hello"))]], padding=True, **options)
        close(attended(both, model(**both).logits)[0], model(**inputs).logits[0], 1e-4)


def test_images_train_their_newline(built):
    model, processor = presets.build("tiny")
    inputs = processor(text=ONE, images=picture(100, 42))
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.image_newline.grad.any()


def test_budget():
    pooling = VisualPooling((24, 24), 336)
    assert pooling.fit(1024, 32) == (16, 8, 8)
    assert pooling.fit(1024, 3600) == (16, 8, 8)
    assert pooling.fit(1024, 8) == (4, 8, 8)
    assert pooling.fit(1024, 1) == (1, 8, 8)
    for tokens in (1, 2, 7, 63, 64, 65, 500, 5000):
        for frames in (1, 2, 9, 64):
            steps, rows, columns = pooling.fit(tokens, frames)
            assert 1 <= steps * rows * columns <= tokens


# Wrong input

ERRORS = {
    "too few": (
        {"text": TWO, "images": [picture()]},
        "text must hold one <image> for each image, got 2 of them and 1 images; write one where each image belongs",
    ),
    "none": (
        {"text": ONE},
        "text must hold one <image> for each image, got 1 of them and 0 images; write one where each image belongs",
    ),
    "of another prompt": (
        {"text": [ONE, TWO], "images": [[picture(), picture()], [picture()]]},
        "text must hold one <image> for each image of its prompt, got [1, 2] of them and [2, 1] images; write one "
        "where each image belongs",
    ),
    "one each of another prompt": (
        {"text": [TWO, "USER: Hello ASSISTANT: "], "images": [[picture()], [picture()]]},
        "text must hold one <image> for each image of its prompt, got [2, 0] of them and [1, 1] images; write one "
        "where each image belongs",
    ),
    "of no prompt": (
        {"text": ONE, "images": [[], [picture()]]},
        "text must hold one <image> for each image of its prompt, got [1] of them and [0, 1] images; write one where "
        "each image belongs",
    ),
    "guide": (
        {"text": [ONE, "x"], "images": picture(), "guide_text": ["q", None]},
        "guide_text must be text, got None for prompt 1; pass the question",
    ),
    "floats": (
        {"text": ONE, "images": np.zeros((8, 8, 3), np.float32)},
        "an image must be uint8 [H, W, 3] or [3, H, W] in 0 ... 255, got float32 of shape [8, 8, 3]; convert it to "
        "uint8 RGB",
    ),
    "a number": (
        {"text": ONE, "images": 3},
        "an image must be a path, a PIL image, uint8 [H, W, 3] or a tensor [3, H, W], got int; pass frames as videos",
    ),
    "frames": (
        {"text": ONE, "images": [np.zeros((8, 8), np.uint8)]},
        "an image must be a path, a PIL image, uint8 [H, W, 3] or a tensor [3, H, W], got shape [8, 8]; pass frames as "
        "videos",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case, processor):
    arguments, message = ERRORS[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        processor(**arguments)


def test_blocks_as_datasets_and_servers_write_them(tmp_path, processor):
    path = tmp_path / "picture.png"
    path.write_bytes(saved(picture()))
    expected = processor(text=ONE, images=picture())
    text = {"type": "text", "text": "What is it?", "image": None}
    for image in (
        {"type": "image", "image": picture(), "text": None},
        {"type": "image_url", "image_url": {"url": str(path)}},
    ):
        chat = [{"role": "user", "content": [image, text]}]
        inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
        assert all(torch.equal(inputs[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", ["audio", "input_image", None])
def test_a_block_of_another_type(kind, processor):
    message = (
        f"a block of a message must be of type text, image or video, got {kind!r}; the model knows nothing else, leave "
        "it out"
    )
    chat = [{"role": "user", "content": [{"type": kind, "audio": "sound.wav"}, {"type": "text", "text": "What?"}]}]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        processor.apply_chat_template(chat, tokenize=True)


@pytest.mark.parametrize("conversation", [[], [[]]])
def test_an_empty_conversation(conversation, processor):
    message = "a conversation must have at least one message, got none; ask something"
    with pytest.raises(ValueError, match=f"^{message}$"):
        processor.apply_chat_template(conversation, tokenize=True)


@pytest.mark.parametrize("token", ["<image>", "<video>"])
def test_text_that_holds_a_placeholder(token, processor):
    message = (
        f"a block of text must not hold {token}, which stands for a file; write it otherwise, and pass files as blocks "
        "of their own"
    )
    chat = [{"role": "user", "content": [{"type": "text", "text": f"What does {token} mean?"}]}]
    with pytest.raises(ValueError, match=f"^{message}$"):
        processor.apply_chat_template(chat, tokenize=True)


@pytest.mark.parametrize("content", [[], [{"type": "text", "text": " "}]])
def test_a_conversation_without_a_question(content, processor):
    chat = [{"role": "user", "content": [{"type": "image", "image": picture()}, *content]}]
    with pytest.raises(ValueError, match=r"^prompt 0 must ask something in the user's last turn, got images or videos"):
        processor.apply_chat_template(chat, tokenize=True)


def test_missing_file(processor):
    with pytest.raises(FileNotFoundError, match=r"^nowhere\.png: there is no such image; check the path$"):
        processor(text=ONE, images="nowhere.png")


@pytest.mark.parametrize("content", [b"", b"no image", saved(picture())[:60]])
def test_broken_file(content, tmp_path, processor):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=f"^{re.escape(str(path))}: cannot be read as an image .*; pass a file that Pil"
    ):
        processor(text=ONE, images=str(path))


@pytest.mark.parametrize("limit", [100, 2000])  # an error and a warning of Pillow
def test_a_bomb_is_refused(limit, tmp_path, processor, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    path = tmp_path / "large.png"
    path.write_bytes(saved(picture()))
    with pytest.raises(ValueError, match="cannot be read as an image"):
        processor(text=ONE, images=str(path))


def test_postscript_is_not_run(tmp_path, processor):
    path = tmp_path / "picture.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        processor(text=ONE, images=str(path))


def wrong(model, processor, **changes):
    inputs = {**processor(text=ONE, images=picture(100, 42)), **changes}
    return {name: value for name, value in inputs.items() if value is not None}


MODEL_ERRORS = {
    "views": (
        {"image_views": torch.tensor([2])},
        "pixel_values must be [V, 3, S, S] with V = 2, the sum of image_views, each at least 1, got shape "
        "[4, 3, 42, 42] and image_views [2]; concatenate the views of all images",
    ),
    "groups": (
        {"image_groups": torch.tensor([2])},
        "image_groups must sum to the 1 images of image_views, and image_sizes have one row for each, got image_groups "
        "[2] and 1 rows; pass them as PPLlavaProcessor makes them",
    ),
    "another size": (
        {"image_sizes": torch.tensor([[84, 84]])},
        "image_views must be 1, or 1 + 2 * 2 for an image of 84 x 84 pixels, got 4; let PPLlavaProcessor cut it, with "
        "the image_grid_pinpoints of the model",
    ),
    "views in a list": (
        {"image_views": torch.tensor([3, 1]), "image_sizes": torch.ones(2, 2).int(), "image_groups": torch.tensor([2])},
        "image_views must be 1 for each image of a list, got [3, 1]; give each image a group of its own for views",
    ),
    "no guide": (
        {"guide_input_ids": None, "guide_attention_mask": None},
        "guide_input_ids must be given with pixel_values, got None; PPLlavaProcessor makes them from the user's "
        "question",
    ),
    "no image": (
        dict.fromkeys(("pixel_values", "image_sizes", "image_views", "image_groups", "guide_input_ids"))
        | {"guide_attention_mask": None},
        "input_ids holds 14 <image> tokens, but no image came with them; pass pixel_values",
    ),
}


@pytest.mark.parametrize("case", MODEL_ERRORS)
def test_model_errors(case, built):
    model, processor = built["tiny"]
    changes, message = MODEL_ERRORS[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model(**wrong(model, processor, **changes))
