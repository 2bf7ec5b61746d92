"""The model: what a token may see, that batches, caches and backends change nothing, and what each loss trains."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText

from synermedgen_hf import SynerMedGenForConditionalGeneration, SynerMedGenModel
from synermedgen_hf.modeling_synermedgen import allowed_attention, read_layout
from synermedgen_hf.processing_synermedgen import ImageBlock, TextBlock, build_sequence

SCAN, VIEW, SMALL_VIEW, TARGET = (
    ImageBlock("latent", (2, 3)),
    ImageBlock("image", (3, 2)),
    ImageBlock("image", (2, 2)),
    ImageBlock("target", (2, 2)),
)
QUESTION, REMARK, ANSWER = TextBlock([5, 6, 7, 8]), TextBlock([20, 21]), TextBlock([9, 10, 11], learned=True)
SYNTHESIS = [SCAN, VIEW, QUESTION, TARGET]
JOINT = [SCAN, VIEW, QUESTION, TARGET, SCAN, SMALL_VIEW, ANSWER]


def example(config, *blocks, seed=0, labels=False):
    """One sequence with random features, as the model takes it."""
    random = torch.Generator().manual_seed(seed)
    sequence = build_sequence(config, blocks)
    inputs = {"input_ids": torch.tensor([sequence.input_ids])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    images = [block for block in blocks if isinstance(block, ImageBlock)]
    views = [block.grid_hw for block in images if block.kind == "image"]
    noisy = [block.kind == "target" for block in images if block.kind != "image"]
    latents = [block.grid_hw for block in images if block.kind != "image"]
    if views:
        n_patches = sum(rows * columns for rows, columns in views)
        inputs["pixel_values"] = torch.rand(n_patches, 3 * 14 * 14, generator=random) * 2 - 1
        inputs["image_grid_hw"] = torch.tensor(views)
    if latents:
        n_tokens = sum(rows * columns for rows, columns in latents)
        inputs["latents"] = torch.randn(n_tokens, config.latent_token_dim, generator=random)
        inputs["latent_grid_hw"] = torch.tensor(latents)
        inputs["timestep"] = 0.6 * torch.tensor(noisy)
    if labels:
        inputs["labels"] = torch.tensor([sequence.labels])
        n_targets = sequence.input_ids.count(config.target_token_id)
        if n_targets:
            inputs["velocity_labels"] = torch.randn(n_targets, config.latent_token_dim, generator=random)
    return inputs


def collate(config, examples, side):
    """Examples as the rows of one batch, padded on the side named."""
    fillers = {"input_ids": config.pad_token_id, "attention_mask": 0, "labels": -100}
    length = max(one["input_ids"].shape[1] for one in examples)
    batch = {}
    for name in {name: None for one in examples for name in one}:
        values = [one[name] for one in examples if name in one]
        if name in fillers:
            gaps = [length - value.shape[1] for value in values]
            pads = [(gap, 0) if side == "left" else (0, gap) for gap in gaps]
            values = [nn.functional.pad(v, pad, value=fillers[name]) for v, pad in zip(values, pads, strict=True)]
        batch[name] = torch.cat(values)
    return batch


def prompt(config, *blocks, seed=0):
    """A sequence that ends where the answer begins."""
    inputs = example(config, *blocks, seed=seed)
    bos = torch.tensor([[config.bos_token_id]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], bos], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


@torch.no_grad()
def run(model, inputs, **options):
    return model(**{**inputs, **options})


@torch.no_grad()
def hidden(model, inputs):
    names = inputs.keys() - {"labels", "velocity_labels"}
    return model.model(**{name: inputs[name] for name in names}).last_hidden_state


def gradients(model, inputs, loss="loss", **options):
    """By parameter name; `None` where nothing arrived."""
    model.zero_grad(set_to_none=True)
    model(**inputs, **options)[loss].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def contents(cache):
    return [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]


def is_generation(name):
    """The generation expert and everything around it that only latents pass through."""
    return any(part in name for part in ("_moe_gen", "vae2llm", "llm2vae", "time_embedder"))


def shift_each(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))


# ---------------------------------------------------------------------------------------------------------------------
# Blocks and what may see what
# ---------------------------------------------------------------------------------------------------------------------


def test_the_attention_rule(config):
    pixel, noise = ImageBlock("image", (1, 1)), ImageBlock("target", (1, 1))
    ids = torch.tensor([build_sequence(config, [pixel, TextBlock([5]), noise, TextBlock([6])]).input_ids])
    index = torch.arange(12)[None]
    seen = allowed_attention(read_layout(config, ids), index, index, torch.ones(1, 12, dtype=torch.bool))
    expected = """
        111 000 000 000
        111 000 000 000
        111 000 000 000
        111 100 000 000
        111 110 000 000
        111 111 000 000
        111 111 111 000
        111 111 111 000
        111 111 111 000
        111 111 000 100
        111 111 000 110
        111 111 000 111
    """.replace(" ", "").split()
    assert ["".join(str(int(flag)) for flag in row) for row in seen[0, 0]] == expected


@pytest.mark.parametrize("blocks", [[QUESTION], [VIEW, REMARK, VIEW, QUESTION, ANSWER], SYNTHESIS, JOINT])
def test_positions_are_read_off_the_ids(config, blocks):
    sequence = build_sequence(config, blocks)
    layout = read_layout(config, torch.tensor([sequence.input_ids]))
    assert layout.positions.tolist() == [sequence.position_ids]
    texts = sum(len(block.ids) + 2 for block in blocks if isinstance(block, TextBlock))
    assert sequence.next_position == texts + sum(block in (SCAN, VIEW, SMALL_VIEW) for block in blocks)


def test_a_delimiter_inside_a_text_is_text(config):
    start, end = config.vision_start_token_id, config.vision_end_token_id
    layout = read_layout(config, torch.tensor([[5, start, 6, end, 7]]))
    assert layout.block.tolist() == [[-1] * 5] and layout.positions.tolist() == [[0, 1, 2, 3, 4]]


def test_padding_takes_no_position(config):
    ids = torch.tensor([[256, 256, 5, 6], [5, 6, 256, 256]])
    layout = read_layout(config, ids, ids != 256)
    assert layout.positions[0, 2:].tolist() == layout.positions[1, :2].tolist() == [0, 1]


def test_the_noise_is_seen_by_nothing_outside_its_block(model, config):
    clear = example(config, *JOINT)
    noisy = {**clear, "latents": clear["latents"].clone(), "timestep": torch.tensor([0.0, 0.9, 0.0])}
    noisy["latents"][6:10] += 1.0  # the four target tokens, after six of the scan
    noise = read_layout(config, clear["input_ids"]).is_noise
    before, after = hidden(model, clear), hidden(model, noisy)
    torch.testing.assert_close(before[~noise], after[~noise], atol=0, rtol=0)
    assert ((before[noise] - after[noise]).abs().amax(1) > 1e-3).all()  # delimiters included


def test_two_targets_do_not_see_each_other(model, config):
    inputs = example(config, SCAN, QUESTION, TARGET, REMARK, TARGET)
    before = run(model, inputs).velocity
    inputs["latents"][6:10] += 1.0
    after = run(model, inputs).velocity
    assert (before[:4] - after[:4]).abs().max() > 1e-3
    torch.testing.assert_close(before[4:], after[4:], atol=0, rtol=0)


def test_a_text_is_causal_and_an_image_is_not(model, config):
    inputs = example(config, VIEW, QUESTION)
    before = hidden(model, inputs)
    last_word = {**inputs, "input_ids": inputs["input_ids"].clone()}
    last_word["input_ids"][0, -2] = 30
    torch.testing.assert_close(hidden(model, last_word)[:, :-2], before[:, :-2], atol=0, rtol=0)
    last_patch = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    last_patch["pixel_values"][-1] *= -1
    assert ((hidden(model, last_patch) - before).abs().amax(-1) > 1e-4).all()


def test_the_target_depends_on_everything_given(model, config):
    inputs = example(config, *SYNTHESIS)
    before = run(model, inputs).velocity
    other = example(config, *SYNTHESIS, seed=1)
    changes = {
        "scan": {"latents": torch.cat([other["latents"][:6], inputs["latents"][6:]])},
        "view": {"pixel_values": other["pixel_values"]},
        "words": {"input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == 7, 30)},
        "noise": {"latents": torch.cat([inputs["latents"][:6], other["latents"][6:]])},
        "time": {"timestep": torch.tensor([0.0, 0.3])},
        "shape": {"latent_grid_hw": torch.tensor([[3, 2], [2, 2]])},
    }
    for name, change in changes.items():
        assert (run(model, inputs, **change).velocity - before).abs().max() > 1e-3, name


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


def test_loss_ce_is_the_cross_entropy_of_the_next_labelled_token(model, config):
    inputs = example(config, VIEW, QUESTION, ANSWER, labels=True)
    outputs = run(model, inputs)
    answer = [9, 10, 11, config.eos_token_id]
    scores = outputs.logits[0, -5:-1].log_softmax(-1)  # of the answer's BOS and its three words
    expected = -torch.stack([scores[i, word] for i, word in enumerate(answer)]).mean()
    torch.testing.assert_close(outputs.loss_ce, expected)
    assert outputs.loss == outputs.loss_ce and outputs.loss_mse is None and outputs.velocity is None


def test_num_items_in_batch_divides_the_sum(model, config):
    inputs = example(config, QUESTION, ANSWER, labels=True)
    mean, by_eight = run(model, inputs).loss_ce, run(model, inputs, num_items_in_batch=8).loss_ce
    torch.testing.assert_close(by_eight, mean * 4 / 8)


def test_joint_training_has_both_losses(model, config):
    inputs = example(config, *JOINT, labels=True)
    outputs = run(model, inputs)
    assert outputs.velocity.shape == (4, config.latent_token_dim)
    assert outputs.logits.shape == (*inputs["input_ids"].shape, config.text_config.vocab_size)
    torch.testing.assert_close(outputs.loss_mse, ((outputs.velocity - inputs["velocity_labels"]) ** 2).mean())
    torch.testing.assert_close(outputs.loss, outputs.loss_ce + outputs.loss_mse)


def test_a_batch_without_an_answer_has_no_loss_rather_than_nan(model, config):
    inputs = example(config, *SYNTHESIS, labels=True)
    outputs = run(model, inputs)
    assert (inputs["labels"] == -100).all()
    assert outputs.loss_ce == 0 and outputs.loss == outputs.loss_mse > 0


def test_a_fresh_model_predicts_no_velocity(config):
    fresh = SynerMedGenForConditionalGeneration(config)
    assert (run(fresh, example(config, *SYNTHESIS)).velocity == 0).all()
    assert fresh.lm_head.weight.std() > 0.01


def test_every_parameter_learns_from_joint_training(model, config):
    idle = [
        name
        for name, gradient in gradients(model, example(config, *JOINT, labels=True)).items()
        # Softmax does not see a constant added to every key.
        if "vision_model" not in name or not name.endswith("k_proj.bias")
        if gradient is None or not gradient.abs().max() > 0
    ]
    assert idle == []


def test_detaching_leaves_the_forward_as_it_is(model, config):
    inputs = example(config, *JOINT, labels=True)
    usual, detached = run(model, inputs), run(model, inputs, detach_understanding=True)
    assert torch.equal(usual.velocity, detached.velocity) and torch.equal(usual.logits, detached.logits)


def test_detaching_trains_the_generation_expert_only(model, config):
    found = gradients(model, example(config, *JOINT, labels=True), "loss_mse", detach_understanding=True)
    trained = {name for name, gradient in found.items() if gradient is not None and gradient.abs().max() > 0}
    assert trained == {name for name in found if is_generation(name)}


def test_detaching_still_lets_the_answers_train_lm_head(model, config):
    found = gradients(model, example(config, *JOINT, labels=True), "loss_ce", detach_understanding=True)
    trained = [name for name, gradient in found.items() if gradient is not None and gradient.abs().max() > 0]
    assert trained == ["lm_head.weight"]


@pytest.mark.parametrize("detach", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(model, config, detach):
    inputs = example(config, *JOINT, labels=True)
    usual = gradients(model.train(), inputs, detach_understanding=detach)
    calls = []
    model.model.language_model.layers[0].self_attn.q_proj_moe_gen.register_forward_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable()
    checkpointed = gradients(model, inputs, detach_understanding=detach)
    assert len(calls) == 2  # once forward, once again on the way back
    for name, gradient in usual.items():
        if gradient is None:
            assert checkpointed[name] is None, name
        else:
            torch.testing.assert_close(checkpointed[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_train_and_eval_are_the_same(model, config):
    inputs = example(config, *JOINT, labels=True)
    evaluating, training = run(model.eval(), inputs), run(model.train(), inputs)
    assert torch.equal(evaluating.logits, training.logits) and torch.equal(evaluating.velocity, training.velocity)


# ---------------------------------------------------------------------------------------------------------------------
# Two experts
# ---------------------------------------------------------------------------------------------------------------------


def test_the_generation_expert_does_not_touch_understanding(model, config):
    words, picture = example(config, QUESTION), example(config, VIEW, QUESTION)
    logits = [run(model, inputs).logits for inputs in (words, picture)]
    shift_each(parameter for name, parameter in model.named_parameters() if is_generation(name))
    assert torch.equal(run(model, words).logits, logits[0]) and torch.equal(run(model, picture).logits, logits[1])


def test_each_generation_parameter_changes_the_velocity(model, config):
    inputs = example(config, *SYNTHESIS)
    before = run(model, inputs).velocity
    generation = {name: parameter for name, parameter in model.named_parameters() if is_generation(name)}
    for name, parameter in generation.items():
        original = parameter.detach().clone()
        shift_each([parameter])
        assert (run(model, inputs).velocity - before).abs().max() > 1e-4, name
        parameter.data.copy_(original)


def test_each_expert_has_the_same_shapes_and_memory_of_its_own(model):
    parameters = dict(model.named_parameters())
    pairs = [(name, name.replace("_moe_gen", "")) for name in parameters if "_moe_gen" in name]
    assert len(pairs) == 14 * model.config.text_config.num_hidden_layers + 1
    for generation, understanding in pairs:
        assert parameters[generation].shape == parameters[understanding].shape
        assert parameters[generation].data_ptr() != parameters[understanding].data_ptr()
        assert not torch.equal(parameters[generation], parameters[understanding])


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------

ROWS = [SYNTHESIS, [QUESTION, ANSWER], JOINT, [SMALL_VIEW, REMARK, VIEW, QUESTION]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_rows(model, config, side):
    rows = [example(config, *blocks, seed=seed) for seed, blocks in enumerate(ROWS)]
    batch = collate(config, rows, side)
    together, real = hidden(model, batch), batch["attention_mask"].bool()
    for number, row in enumerate(rows):
        torch.testing.assert_close(together[number][real[number]], hidden(model, row)[0], atol=1e-5, rtol=1e-5)
    velocity = torch.cat([run(model, rows[0]).velocity, run(model, rows[2]).velocity])
    torch.testing.assert_close(run(model, batch).velocity, velocity, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_the_gradients_as_they_are(model, config, side):
    learned = example(config, VIEW, QUESTION, ANSWER, labels=True)
    longer = example(config, VIEW, QUESTION, VIEW, REMARK, QUESTION, labels=True, seed=1)
    alone = gradients(model, learned)
    padded = gradients(model, collate(config, [learned, longer], side))
    for name, gradient in alone.items():
        if gradient is not None:
            torch.testing.assert_close(padded[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_implementations_agree(model, config, implementation, side):
    batch = collate(config, [example(config, *blocks, seed=seed) for seed, blocks in enumerate(ROWS)], side)
    real = batch["attention_mask"].bool()
    assert model.config._attn_implementation == "sdpa"
    expected = hidden(model, batch)[real]
    model.set_attn_implementation(implementation)
    assert model.config.text_config._attn_implementation == implementation
    assert model.config.vision_config._attn_implementation == implementation
    with torch.compiler.set_stance("force_eager"):  # flex attention would be compiled first
        torch.testing.assert_close(hidden(model, batch)[real], expected, atol=2e-5, rtol=1e-5)


def test_bfloat16_lies_near_float32(model, config):
    inputs = example(config, *JOINT, labels=True)
    exact, rough = run(model, inputs), run(model.to(torch.bfloat16), inputs)
    assert rough.logits.dtype == rough.velocity.dtype == torch.bfloat16
    for name in ("logits", "velocity"):
        error = (rough[name].float() - exact[name]).norm() / exact[name].norm()
        assert 0 < error < 0.05, name
    torch.testing.assert_close(rough.loss, exact.loss, rtol=0.05, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Caches
# ---------------------------------------------------------------------------------------------------------------------


def split_context(config, inputs):
    """A synthesis as context and target: two calls instead of one."""
    layout = read_layout(config, inputs["input_ids"], inputs["attention_mask"])
    start = int(layout.is_noise[0].nonzero()[0])
    blocks, scan_tokens = inputs["latent_grid_hw"], inputs["latent_grid_hw"][:-1].prod(1).sum()
    context = {name: inputs[name][:, :start] for name in ("input_ids", "attention_mask")}
    context |= {name: inputs[name] for name in ("pixel_values", "image_grid_hw") if name in inputs}
    if len(blocks) > 1:
        context |= {
            "latents": inputs["latents"][:scan_tokens],
            "latent_grid_hw": blocks[:-1],
            "timestep": inputs["timestep"][:-1],
        }
    target = {
        "input_ids": inputs["input_ids"][:, start:],
        "position_ids": layout.positions[:, start:],
        "latents": inputs["latents"][scan_tokens:],
        "latent_grid_hw": blocks[-1:],
        "timestep": inputs["timestep"][-1:],
    }
    return context, target


@pytest.mark.parametrize("blocks", [SYNTHESIS, [SCAN, VIEW, SCAN, SMALL_VIEW, QUESTION, TARGET], [QUESTION, TARGET]])
def test_denoising_against_the_cache_equals_the_joint_forward(model, config, blocks):
    inputs = example(config, *blocks)
    context, target = split_context(config, inputs)
    cache = run(model, context, use_cache=True).past_key_values
    before = contents(cache)
    assert cache.get_seq_length() == context["input_ids"].shape[1]

    for use_cache in (None, False):
        outputs = run(model, target, past_key_values=cache, use_cache=use_cache)
        torch.testing.assert_close(outputs.velocity, run(model, inputs).velocity, atol=1e-5, rtol=1e-5)
        assert outputs.logits is None  # nobody reads them here
    assert cache.get_seq_length() == context["input_ids"].shape[1]
    assert all(map(torch.equal, before, contents(cache)))


def test_a_context_padded_on_the_left_is_masked_in_the_cache(model, config):
    rows = [example(config, *blocks, seed=seed) for seed, blocks in enumerate([SYNTHESIS, [REMARK, TARGET]])]
    contexts, targets = zip(*(split_context(config, row) for row in rows), strict=True)
    context = collate(config, contexts, "left")
    target = {name: torch.cat([one[name] for one in targets]) for name in targets[0]}
    mask = torch.cat([context["attention_mask"], torch.ones_like(target["input_ids"])], dim=1)
    cache = run(model, context, use_cache=True).past_key_values
    velocity = run(model, target, attention_mask=mask, past_key_values=cache).velocity
    expected = torch.cat([run(model, row).velocity for row in rows])
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)


def test_several_caches_serve_groups_of_rows(model, config):
    rows = [example(config, *blocks, seed=seed) for seed, blocks in enumerate([SYNTHESIS, [REMARK, TARGET]])]
    contexts, targets = zip(*(split_context(config, row) for row in rows), strict=True)
    caches = [run(model, context, use_cache=True).past_key_values for context in contexts]
    assert caches[0].get_seq_length() != caches[1].get_seq_length()
    before = [contents(cache) for cache in caches]
    target = {name: torch.cat([one[name] for one in targets]) for name in targets[0]}
    velocity = run(model, target, past_key_values=caches).velocity
    expected = torch.cat([run(model, row).velocity for row in rows])
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)
    for old, cache in zip(before, caches, strict=True):
        assert all(map(torch.equal, old, contents(cache)))


def test_one_pass_fills_the_cache_as_block_by_block_does(model, config):
    blocks = [SCAN, VIEW, QUESTION, SCAN, SMALL_VIEW, REMARK]
    inputs = example(config, *blocks)
    at_once = model.model(**inputs, use_cache=True)
    positions = read_layout(config, inputs["input_ids"]).positions
    cache, states, start, patches, tokens = None, [], 0, 0, 0
    for block in blocks:
        features = {}
        count = len(block.ids) if isinstance(block, TextBlock) else block.grid_hw[0] * block.grid_hw[1]
        if block in (VIEW, SMALL_VIEW):
            features["pixel_values"] = inputs["pixel_values"][patches : patches + count]
            features["image_grid_hw"] = torch.tensor([block.grid_hw])
            patches += count
        elif block is SCAN:
            features["latents"] = inputs["latents"][tokens : tokens + count]
            features["latent_grid_hw"], features["timestep"] = torch.tensor([block.grid_hw]), torch.zeros(1)
            tokens += count
        part = slice(start, start + count + 2)
        outputs = model.model(
            inputs["input_ids"][:, part],
            position_ids=positions[:, part],
            past_key_values=cache,
            use_cache=True,
            **features,
        )
        cache, start = outputs.past_key_values, part.stop
        states.append(outputs.last_hidden_state)
    torch.testing.assert_close(torch.cat(states, dim=1), at_once.last_hidden_state, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(contents(cache), contents(at_once.past_key_values), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_no_cache_is_written_unless_asked_for(model, config):
    inputs = example(config, QUESTION)
    assert run(model, inputs).past_key_values is None
    assert run(model, inputs, use_cache=True).past_key_values.get_seq_length() == 6


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------

PROMPTS = [[VIEW, REMARK, SMALL_VIEW, QUESTION, VIEW], [REMARK, SMALL_VIEW]]


def generate(model, inputs, steps=6):
    return model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )


@pytest.mark.parametrize("blocks", PROMPTS)
def test_generate_equals_a_full_forward_for_every_word(model, config, blocks):
    inputs = prompt(config, *blocks)
    outputs = generate(model, inputs)
    ids = inputs["input_ids"]
    for scores in outputs.logits:
        logits = run(model, inputs, input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
        torch.testing.assert_close(scores, logits, atol=2e-5, rtol=1e-5)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(outputs.sequences, ids)


def test_generate_reads_the_images_once_and_one_token_after_another(model, config):
    lengths, images = [], []
    model.register_forward_pre_hook(lambda _, args, kw: lengths.append(kw["input_ids"].shape[1]), with_kwargs=True)
    model.model.vision_model.register_forward_pre_hook(lambda *_: images.append(1))
    inputs = prompt(config, VIEW, QUESTION)
    generate(model, inputs, steps=4)
    assert lengths == [inputs["input_ids"].shape[1], 1, 1, 1] and len(images) == 1


def test_a_left_padded_batch_generates_what_each_prompt_does(model, config):
    prompts = [prompt(config, *blocks, seed=seed) for seed, blocks in enumerate(PROMPTS)]
    batch = generate(model, collate(config, prompts, "left"))
    for number, alone in enumerate(generate(model, one) for one in prompts):
        assert batch.sequences[number, -6:].tolist() == alone.sequences[0, -6:].tolist()
        for together, single in zip(batch.logits, alone.logits, strict=True):
            torch.testing.assert_close(together[number], single[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("stand_in", ["image", "latent", "target"])
def test_a_stand_in_is_never_generated(model, config, stand_in):
    inputs, token = prompt(config, VIEW, QUESTION), getattr(config, f"{stand_in}_token_id")
    with torch.no_grad():
        model.lm_head.weight[token] = 10 * hidden(model, inputs)[0, -1]
    assert run(model, inputs).logits[0, -1].argmax() == token
    assert token not in model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]


def test_checkpointing_in_training_writes_no_cache(model, config):
    inputs = example(config, SCAN, QUESTION)
    expected = run(model, inputs).logits
    model.train().activation_checkpointing_enable()
    outputs = model(**inputs, use_cache=True)
    assert outputs.past_key_values is None
    torch.testing.assert_close(outputs.logits, expected)


def test_the_answer_depends_on_each_image(model, config):
    inputs = prompt(config, *PROMPTS[0])
    before = run(model, inputs).logits[:, -1]
    start = 0
    for count in inputs["image_grid_hw"].prod(1).tolist():
        pixels = inputs["pixel_values"].clone()
        pixels[start : start + count] *= -1
        assert (run(model, inputs, pixel_values=pixels).logits[:, -1] - before).abs().max() > 1e-3
        start += count


def test_image_features_may_be_computed_before(model, config):
    inputs = example(config, VIEW, REMARK, SMALL_VIEW, QUESTION)
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_hw"])
    assert [len(image) for image in features.pooler_output] == [6, 4]
    words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(run(model, words, mm_encoder_outputs={"image": features}).logits, run(model, inputs).logits)


def test_logits_to_keep(model, config):
    inputs = example(config, QUESTION)
    logits = run(model, inputs).logits
    torch.testing.assert_close(run(model, inputs, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(run(model, inputs, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]])


def test_hidden_states_are_the_embeddings_and_each_layer_in_sequence_order(model, config):
    inputs = example(config, *JOINT)
    outputs = model.model(**inputs, output_hidden_states=True)
    assert len(outputs.hidden_states) == config.text_config.num_hidden_layers + 1
    layout, text_model = read_layout(config, inputs["input_ids"]), model.model.language_model
    words = layout.block < 0
    assert torch.equal(outputs.hidden_states[0][words], text_model.embed_tokens(inputs["input_ids"][words]))
    for mine, norm in ((~layout.is_latent, text_model.norm), (layout.is_latent, text_model.norm_moe_gen)):
        torch.testing.assert_close(norm(outputs.hidden_states[-1][mine]), outputs.last_hidden_state[mine])
    assert len(run(model, inputs, output_hidden_states=True).hidden_states) == len(outputs.hidden_states)
    assert run(model, inputs).hidden_states is None


# ---------------------------------------------------------------------------------------------------------------------
# Saving, loading, resizing
# ---------------------------------------------------------------------------------------------------------------------


def test_save_and_load_is_exact(model, config, tmp_path):
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if "generation" not in path.name) == [
        "config.json",
        "configuration_synermedgen.py",  # the code comes along, for those without the package
        "loading_synermedgen.py",
        "model.safetensors",
        "modeling_synermedgen.py",
    ]
    again, report = SynerMedGenForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    weights, loaded = model.state_dict(), again.state_dict()
    assert weights.keys() == loaded.keys()
    assert all(torch.equal(weights[name], loaded[name]) for name in weights)
    inputs = example(config, *JOINT, labels=True)  # position tables are not saved but computed again
    ours, theirs = run(model, inputs), run(again, inputs)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.velocity, theirs.velocity)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForImageTextToText])
def test_auto_classes_give_the_whole_model(model, config, tmp_path, auto):
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert type(again) is SynerMedGenForConditionalGeneration and not again.training
    inputs = example(config, *SYNTHESIS)
    assert torch.equal(run(again, inputs).velocity, run(model, inputs).velocity)


def test_the_backbone_loads_from_the_whole_model(model, config, tmp_path):
    model.save_pretrained(tmp_path)
    backbone = SynerMedGenModel.from_pretrained(tmp_path)
    inputs = example(config, *JOINT)
    with torch.no_grad():
        assert torch.equal(backbone(**inputs).last_hidden_state, hidden(model, inputs))


def test_loading_in_bfloat16(model, config, tmp_path):
    model.save_pretrained(tmp_path)
    half = SynerMedGenForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    inputs = example(config, *SYNTHESIS)
    exact, rough = run(model, inputs).velocity, run(half, inputs).velocity.float()
    assert (rough - exact).norm() < 0.05 * exact.norm()


def test_more_words(model, config):
    inputs = example(config, VIEW, QUESTION)
    before, size = run(model, inputs).logits, config.text_config.vocab_size
    model.resize_token_embeddings(size + 5)
    assert model.config.text_config.vocab_size == size + 5
    after = run(model, inputs).logits
    assert after.shape[-1] == size + 5
    torch.testing.assert_close(after[..., :size], before)
    new_word = example(config, QUESTION, TextBlock([size + 4], learned=True), labels=True)
    assert torch.isfinite(run(model, new_word).loss)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (ImageBlock("image", (9, 2)), "9x2 tokens does not fit the 8x8 table of ViT positions"),
        (ImageBlock("latent", (2, 9)), "2x9 tokens does not fit the 8x8 table of latent positions"),
        (ImageBlock("target", (9, 9)), "9x9 tokens does not fit the 8x8 table of latent positions"),
    ],
)
def test_an_image_larger_than_the_position_table(model, config, block, words):
    with pytest.raises(ValueError, match=f"{words}.*Make the image smaller, or use a checkpoint with a larger table"):
        run(model, example(config, block, QUESTION))


def test_an_image_as_large_as_the_position_table_fits(model, config):
    inputs = example(config, ImageBlock("latent", (8, 8)), ImageBlock("image", (8, 8)), ImageBlock("target", (8, 1)))
    assert torch.isfinite(run(model, inputs).velocity).all()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["pixel_values", "image_grid_hw"], "6 image tokens in `input_ids`, 0 patches in `pixel_values`"),
        (["latents", "latent_grid_hw", "timestep"], "10 latent tokens in `input_ids`, 0 in `latents`"),
    ],
)
def test_image_tokens_without_an_image(model, config, names, words):
    inputs = example(config, *SYNTHESIS)
    with pytest.raises(ValueError, match=words):
        run(model, {name: value for name, value in inputs.items() if name not in names})


@pytest.mark.parametrize(
    ("has", "wants", "words"),
    [
        (VIEW, SMALL_VIEW, "4 image tokens in `input_ids`, 6 patches in `pixel_values`"),
        (SCAN, ImageBlock("latent", (2, 2)), "4 latent tokens in `input_ids`, 6 in `latents`"),
        (VIEW, REMARK, "0 image tokens in `input_ids`, 6 patches in `pixel_values`"),
    ],
)
def test_an_image_of_another_size_than_its_tokens(model, config, has, wants, words):
    words_only = example(config, wants, QUESTION)
    ids = {name: words_only[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=words):
        run(model, example(config, has, QUESTION), **ids)


def test_continuing_a_cache_without_positions(model, config):
    cache = run(model, example(config, VIEW, QUESTION), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="needs `position_ids`: an image block counts as one position"):
        run(model, {"input_ids": torch.tensor([[5]])}, past_key_values=cache)


def test_several_caches_are_only_read(model, config):
    caches = [run(model, example(config, QUESTION), use_cache=True).past_key_values for _ in range(2)]
    inputs = {"input_ids": torch.tensor([[5], [5]]), "position_ids": torch.tensor([[6], [6]])}
    for wrong in ({"use_cache": True}, {"attention_mask": torch.ones(2, 7)}):
        with pytest.raises(ValueError, match="2 caches for 2 rows.*only read"):
            run(model, inputs, past_key_values=caches, **wrong)
    with pytest.raises(ValueError, match="2 caches for 1 rows"):
        run(model, {name: value[:1] for name, value in inputs.items()}, past_key_values=caches)


def test_velocity_labels_without_a_target(model, config):
    with pytest.raises(ValueError, match="`velocity_labels` has 4 rows for 0 target tokens"):
        run(model, example(config, SCAN, QUESTION), velocity_labels=torch.zeros(4, config.latent_token_dim))


@pytest.mark.parametrize("name", ["pixel_values", "latents", "timestep", "velocity_labels"])
def test_a_row_too_few_is_not_broadcast(model, config, name):
    inputs = example(config, *SYNTHESIS, labels=True)
    inputs[name] = inputs[name][:1]
    with pytest.raises(ValueError, match=f"`{name}` has 1 rows for "):
        run(model, inputs)


def test_a_mask_of_four_dimensions(model, config):
    with pytest.raises(ValueError, match=r"attention_mask must be \(batch, past \+ length\)"):
        run(model, example(config, QUESTION), attention_mask=torch.ones(1, 1, 6, 6))
