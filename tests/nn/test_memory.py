"""Each memory: one function whether read at once or step by step, of what it may know, and of nothing else."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from metarl.nn.attention import Episodic, Transformer, _Attention
from metarl.nn.memory import History, join, rows
from metarl.nn.recurrent import Gru, Lstm

SIZE, STEPS, BATCH = 5, 13, 4

CELLS = {
    "gru": lambda g: Gru(SIZE, 6, g),
    "lstm": lambda g: Lstm(SIZE, 6, g),
    "transformer": lambda g: Transformer(SIZE, 8, 2, 2, 64, g),
    "transformer-short": lambda g: Transformer(SIZE, 8, 2, 2, 4, g),
    "episodic": lambda g: Episodic(SIZE, 6, 2, 64, g),
    "episodic-short": lambda g: Episodic(SIZE, 6, 2, 4, g),
}
every_cell = pytest.mark.parametrize("name", CELLS)


def make_cell(name, dtype=torch.float64):
    """In double precision and with weights that are not small, so that no influence is lost in rounding."""
    cell = CELLS[name](torch.Generator().manual_seed(3)).to(dtype)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.copy_(1.5 * parameter + 0.1 * torch.randn(parameter.shape, generator=draws(5), dtype=dtype))
    return cell


def draws(seed):
    return torch.Generator().manual_seed(seed)


def make_inputs(batch=BATCH, steps=STEPS, seed=0, dtype=torch.float64):
    return torch.randn(batch, steps, SIZE, generator=draws(seed), dtype=dtype)


def walk(cell, inputs, state=None, active=None):
    """Read `[B, T, I]` step by step; returns the outputs and all states, the one before the first step included."""
    states, outputs = [cell.initial(len(inputs)) if state is None else state], []
    with torch.no_grad():
        for t in range(inputs.shape[1]):
            output, after = cell.step(inputs[:, t], states[-1], None if active is None else active[:, t])
            outputs.append(output)
            states.append(after)
    return torch.stack(outputs, 1) if outputs else None, states


def scan(cell, inputs, state=None):
    with torch.no_grad():
        return cell.scan(inputs, cell.initial(len(inputs)) if state is None else state)


def contents(state):
    """What a state holds, row by row: hidden states, and the entries of histories that count."""
    held = []
    for part in state:
        if isinstance(part, History):
            lengths = part.lengths.tolist()
            held += [kept[row, :length] for kept in (part.keys, part.values) for row, length in enumerate(lengths)]
        else:
            held += list(part)
    return [part.clone() for part in held]


def newest_contents(state, context):
    """As `contents`, of each history the last `context` entries: older ones may be kept, but are not read."""
    return [part[-context:] if part.ndim == 2 else part for part in contents(state)]


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# One function


@every_cell
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_reading_at_once_is_reading_step_by_step(name, dtype, atol):
    cell, inputs = make_cell(name, dtype), make_inputs(dtype=dtype)
    at_once, state = scan(cell, inputs)
    one_by_one, states = walk(cell, inputs)
    assert at_once.shape == (BATCH, STEPS, cell.output_size) and at_once.std() > 0.1
    torch.testing.assert_close(at_once, one_by_one, rtol=0, atol=atol)
    for a, b in zip(newest_contents(state, 4), newest_contents(states[-1], 4), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@every_cell
@pytest.mark.parametrize("steps", [1, 3, 5, 12])
def test_reading_in_chunks_is_reading_at_once(name, steps):
    cell, inputs = make_cell(name), make_inputs()
    expected, _ = scan(cell, inputs)
    state, parts = cell.initial(BATCH), []
    for chunk in inputs.split(steps, 1):
        part, state = scan(cell, chunk, state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-12)


@every_cell
def test_steps_and_scans_may_take_turns(name):
    cell, inputs = make_cell(name), make_inputs()
    expected, _ = scan(cell, inputs)
    first, states = walk(cell, inputs[:, :3])
    second, state = scan(cell, inputs[:, 3:7], states[-1])
    third, states = walk(cell, inputs[:, 7:9], state)
    last, _ = scan(cell, inputs[:, 9:], states[-1])
    torch.testing.assert_close(torch.cat([first, second, third, last], 1), expected, rtol=0, atol=1e-12)


@every_cell
def test_a_trial_much_longer_than_the_context(name):
    """Long enough for a history to be moved several times."""
    cell, inputs = make_cell(name), make_inputs(batch=2, steps=150)
    torch.testing.assert_close(walk(cell, inputs)[0], scan(cell, inputs)[0], rtol=0, atol=1e-11)


@every_cell
def test_a_batch_is_its_rows_one_by_one(name):
    cell, inputs = make_cell(name), make_inputs()
    together, _ = walk(cell, inputs)
    alone = torch.cat([walk(cell, row[None])[0] for row in inputs])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(scan(cell, inputs)[0], alone, rtol=0, atol=1e-12)
    assert not torch.allclose(alone[0], alone[1], atol=0.1)


@every_cell
def test_the_future_changes_nothing(name):
    cell, inputs = make_cell(name), make_inputs()
    changed = inputs.clone()
    changed[:, 6:] += 1.0
    before, after = scan(cell, inputs)[0], scan(cell, changed)[0]
    torch.testing.assert_close(after[:, :6], before[:, :6], rtol=0, atol=1e-12)
    assert (after[:, 6:] - before[:, 6:]).abs().amax(-1).min() > 1e-3


# A state belongs to who holds it


@every_cell
def test_an_old_state_may_be_stepped_from_again(name):
    """From the state after 5 steps go on twice, taking turns; each branch is as if it were alone."""
    cell, inputs, others = make_cell(name), make_inputs(), make_inputs(seed=1)
    _, states = walk(cell, inputs[:, :5])
    expected = [scan(cell, torch.cat([inputs[:, :5], branch], 1))[0][:, 5:] for branch in (inputs[:, 5:], others)]
    branches = [[states[-1]], [states[-1]]]
    for t in range(8):
        for branch, ahead, wanted in zip(branches, (inputs[:, 5:], others), expected, strict=True):
            with torch.no_grad():
                output, after = cell.step(ahead[:, t], branch[-1])
            torch.testing.assert_close(output, wanted[:, t], rtol=0, atol=1e-12)
            branch.append(after)


@every_cell
def test_reading_leaves_every_earlier_state_as_it_was(name):
    cell, inputs = make_cell(name), make_inputs(steps=40)
    states, copies = [cell.initial(BATCH)], []
    with torch.no_grad():
        for t in range(40):
            copies.append(contents(states[-1]))
            states.append(cell.step(inputs[:, t], states[-1])[1])
            cell.step(inputs[:, t] + 1.0, states[t // 2])
            cell.scan(inputs[:, :3], states[t // 3])
    for t, (state, copy) in enumerate(zip(states[:-1], copies, strict=True)):
        assert_equal(contents(state), copy)
        output, _ = walk(cell, inputs[:, t : t + 1], state)
        torch.testing.assert_close(output[:, 0], scan(cell, inputs)[0][:, t], rtol=0, atol=1e-12)


@every_cell
@pytest.mark.parametrize("written", [float("nan"), 9.0])
def test_rows_that_are_not_active_remember_as_they_did(name, written):
    """Rows stop and go on at random; their inputs meanwhile are garbage. Each is as its own active steps alone."""
    cell, steps = make_cell(name), 40
    active = torch.rand(BATCH, steps, generator=draws(2)) < torch.tensor([1.0, 0.7, 0.4, 0.0])[:, None]
    inputs = make_inputs(steps=steps).masked_fill(~active[..., None], written)
    outputs, states = walk(cell, inputs, active=active)
    for row in range(BATCH):
        own = inputs[row : row + 1, active[row]]
        if own.shape[1]:
            expected, _ = scan(cell, own)
            torch.testing.assert_close(outputs[row, active[row]], expected[0], rtol=0, atol=1e-12)
    for t in range(steps):
        for before, after in zip(states[t], states[t + 1], strict=True):
            still = (~active[:, t]).nonzero()[:, 0]
            assert_equal(
                newest_contents(rows((after,), still), cell_context(name)),
                newest_contents(rows((before,), still), cell_context(name)),
            )


def cell_context(name):
    return 4 if name.endswith("short") else 64


@every_cell
def test_a_scan_after_rows_that_stopped(name):
    """The states of rows of different length are scanned from: as learning does from what acting left."""
    cell, inputs, more = make_cell(name), make_inputs(), make_inputs(steps=6, seed=1)
    active = torch.arange(STEPS) < torch.tensor([STEPS, 7, 2, 0])[:, None]
    _, states = walk(cell, inputs, active=active)
    outputs, after = scan(cell, more, states[-1])
    last, _ = walk(cell, more[:, :1], after)
    for row in range(BATCH):
        own = torch.cat([inputs[row, active[row]], more[row], more[row, :1]])
        expected = scan(cell, own[None])[0][0]
        torch.testing.assert_close(outputs[row], expected[-7:-1], rtol=0, atol=1e-12)
        torch.testing.assert_close(last[row, 0], expected[-1], rtol=0, atol=1e-12)


# Rows


@every_cell
def test_rows_go_on_as_the_sequences_that_they_were(name):
    cell, inputs, more = make_cell(name), make_inputs(), make_inputs(steps=3, seed=1)
    _, states = walk(cell, inputs)
    chosen = torch.tensor([2, 0, 2])
    picked = rows(states[-1], chosen)
    outputs, _ = walk(cell, more[chosen], picked)
    torch.testing.assert_close(outputs, walk(cell, more, states[-1])[0][chosen], rtol=0, atol=1e-12)
    other, _ = walk(cell, more[[1, 1, 1]], picked)  # row 2 was named twice: its copies are apart
    alone = [walk(cell, more[1:2], rows(states[-1], torch.tensor([row])))[0] for row in (2, 0, 2)]
    torch.testing.assert_close(other, torch.cat(alone), rtol=0, atol=1e-12)


@every_cell
@pytest.mark.parametrize("lengths", [(0, 3), (9, 2), (20, 5), (5, 0, 40)])
def test_joined_states_go_on_as_each_did(name, lengths):
    cell, more = make_cell(name), make_inputs(batch=2 * len(lengths), steps=20, seed=1)
    apart = [walk(cell, make_inputs(batch=2, steps=40, seed=9)[:, :length])[1][-1] for length in lengths]
    held = [contents(part) for part in apart]
    together = join(apart)
    outputs, _ = walk(cell, more, together)
    scanned, _ = scan(cell, more, together)
    expected = [walk(cell, part, state)[0] for part, state in zip(more.split(2), apart, strict=True)]
    torch.testing.assert_close(outputs, torch.cat(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(scanned, torch.cat(expected), rtol=0, atol=1e-12)
    for part, before in zip(apart, held, strict=True):
        assert_equal(contents(part), before)
    parts = [rows(together, torch.arange(2) + 2 * i) for i in range(len(lengths))]
    for part, state in zip(parts, apart, strict=True):
        assert_equal(newest_contents(part, 40), newest_contents(state, 40))


# What attention reads


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_layer_attends_to_the_context_and_no_further(layers):
    """Each layer reaches context − 1 steps back: 3 · layers here."""
    cell = Transformer(SIZE, 8, layers, 2, 4, draws(3)).double()
    inputs = make_inputs(batch=1, steps=16)
    for read in (scan, walk):
        before = read(cell, inputs)[0]
        for t in range(16):
            changed = inputs.clone()
            changed[:, t] += 1.0
            effect = (read(cell, changed)[0] - before)[0].abs().amax(-1)
            reached = range(t, min(16, t + 3 * layers + 1))
            assert all((effect[u] > 1e-9) == (u in reached) for u in range(16))


def test_facts_beyond_the_context_are_forgotten():
    """The GRU remembers them; its state is put back to see what the facts alone do."""
    cell = make_cell("episodic-short")
    inputs = make_inputs(batch=1, steps=6)
    for t in range(6):
        changed = inputs.clone()
        changed[:, t] += 1.0
        (hidden, *_), (*_, facts), (*_, others) = (walk(cell, part[:, :5])[1][-1] for part in (inputs, inputs, changed))
        asked = inputs[:, 5:]
        effect = walk(cell, asked, (hidden, others))[0] - walk(cell, asked, (hidden, facts))[0]
        assert (effect.abs().max() > 1e-6) == (t in (2, 3, 4))  # and the step itself, which makes 4


def test_an_agent_with_facts_reads_them_in_any_order():
    """The facts of an episodic memory are shuffled, and what the GRU asks stays as it is."""
    cell, inputs = make_cell("episodic"), make_inputs(batch=1)
    hidden, facts = walk(cell, inputs)[1][-1]
    order = torch.cat([torch.randperm(STEPS, generator=draws(6)), torch.arange(STEPS, facts.keys.shape[1])])
    shuffled = replace(facts, keys=facts.keys[:, order], values=facts.values[:, order], newest=[])
    for read in (walk, scan):
        expected = read(cell, inputs[:, :3], (hidden, facts))[0]
        torch.testing.assert_close(read(cell, inputs[:, :3], (hidden, shuffled))[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["transformer", "episodic"])
def test_a_context_of_one_step(name):
    """A layer sees its own step only; so a transformer without memory of what was before."""
    cell = make_cell(name + "-short")
    for part in cell.modules():
        if isinstance(part, _Attention):
            part.context = 1
    inputs = make_inputs()
    outputs, _ = walk(cell, inputs)
    torch.testing.assert_close(scan(cell, inputs)[0], outputs, rtol=0, atol=1e-12)
    if name == "transformer":
        alone = torch.cat([scan(cell, inputs[:, t : t + 1])[0] for t in range(STEPS)], 1)
        torch.testing.assert_close(outputs, alone, rtol=0, atol=1e-12)


def make_attention(heads=2, context=64, recency=False):
    return _Attention(3, SIZE, 4, heads, context, recency, draws(1)).double()


def test_facts_are_read_by_content_and_not_by_place():
    attention = make_attention()
    facts, question = make_inputs(batch=1), torch.randn(1, STEPS, 3, generator=draws(4), dtype=torch.float64)
    order = torch.cat([torch.randperm(STEPS - 1, generator=draws(6)), torch.tensor([STEPS - 1])])
    with torch.no_grad():
        read, history = attention.scan(question, facts, attention.initial(1))
        shuffled, _ = attention.scan(question, facts[:, order], attention.initial(1))
        torch.testing.assert_close(shuffled[:, -1], read[:, -1], rtol=0, atol=1e-12)
        assert not torch.allclose(shuffled[:, 3], read[:, 3], atol=1e-3)
        # A fact that answers the question is read alike, however long ago it was.
        (keys, values) = attention._key_value(facts).chunk(2, -1)
        query = attention._query(question[:, -1])
        scores = (query.view(2, 2)[None] * keys[0].view(-1, 2, 2)).sum(-1) / math.sqrt(2.0)
        expected = (scores.softmax(0)[..., None] * values[0].view(-1, 2, 2)).sum(0).flatten()
        torch.testing.assert_close(read[0, -1], expected, rtol=0, atol=1e-12)
    assert history.lengths.tolist() == [STEPS]


@pytest.mark.parametrize("recency", [False, True])
def test_the_weight_of_a_fact_by_its_distance(recency):
    """Keys of zero: without recency all facts weigh the same; with it head h of 2 by exp(−2^(−4h) · distance).

    At distances 2, 1, 0 that is e^(−2/16), e^(−1/16), 1 in the first head and e^(−2/256), e^(−1/256), 1 in the second.
    """
    attention = make_attention(recency=recency)
    values = torch.eye(3, dtype=torch.float64)[..., None] * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    slopes = [1 / 16, 1 / 256] if recency else [0.0, 0.0]
    expected = []
    for slope in slopes:
        weights = torch.tensor([math.exp(-slope * distance) for distance in (2, 1, 0)], dtype=torch.float64)
        expected.append(weights / weights.sum())
    distance = torch.tensor([[[2, 1, 0]]])
    for fact in range(3):
        read = attention._attend(
            torch.ones(1, 1, 3, dtype=torch.float64), torch.zeros(1, 3, 4).double(), values[fact][None], distance
        )
        by_hand = torch.stack([expected[0][fact] * n if n < 3 else expected[1][fact] * n for n in (1, 2, 3, 4)])
        torch.testing.assert_close(read[0, 0], by_hand, rtol=0, atol=1e-12)


def test_an_old_fact_is_as_near_as_a_new_one():
    """How a fact of the first step and one of the last but one move the read, when both say the same."""
    attention = make_attention()
    question = torch.randn(1, 1, 3, generator=draws(4), dtype=torch.float64).expand(1, 50, 3)
    facts = make_inputs(batch=1, steps=50)
    facts[:, 48] = facts[:, 0]
    facts.requires_grad_()
    read, _ = attention.scan(question, facts, attention.initial(1))
    (gradient,) = torch.autograd.grad(read[0, -1].sum(), facts)
    assert gradient[0, 0].abs().max() > 1e-4
    torch.testing.assert_close(gradient[0, 0], gradient[0, 48], rtol=0, atol=1e-12)


# Learning


@every_cell
def test_gradients_of_a_scan_are_those_of_steps(name):
    """Steps from `rows` of a state, which are in memory of their own, so that nothing is overwritten."""
    cell, inputs = make_cell(name), make_inputs(steps=7)
    weights = torch.randn(BATCH, 7, cell.output_size, generator=draws(8), dtype=torch.float64)
    outputs, _ = cell.scan(inputs, cell.initial(BATCH))
    at_once = torch.autograd.grad((outputs * weights).sum(), list(cell.parameters()))
    state, loss = cell.initial(BATCH), 0.0
    for t in range(7):
        output, state = cell.step(inputs[:, t], rows(state, torch.arange(BATCH)))
        loss = loss + (output * weights[:, t]).sum()
    one_by_one = torch.autograd.grad(loss, list(cell.parameters()))
    for a, b in zip(at_once, one_by_one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@every_cell
def test_no_gradient_reaches_the_state_that_a_scan_begins_with(name):
    """Whether a scan or a step has led to it."""
    cell, inputs = make_cell(name), make_inputs()
    expected, _ = scan(cell, inputs)
    first = inputs[:, :5].clone().requires_grad_()
    _, scanned = cell.scan(first, cell.initial(BATCH))
    _, stepped = cell.step(first[:, 4], scan(cell, inputs[:, :4])[1])
    for state in (scanned, stepped):
        later, _ = cell.scan(inputs[:, 5:], state)
        torch.testing.assert_close(later, expected[:, 5:], rtol=0, atol=1e-12)
        (reached,) = torch.autograd.grad(later.sum(), first, allow_unused=True)
        assert reached is None or (reached == 0).all()


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_the_forget_gate_is_open_at_first_and_other_biases_are_0(name):
    cell = CELLS[name](draws(0))
    expected = torch.zeros(24)
    if name == "lstm":
        expected[6:12] = 1.0  # gates in the order input, forget, cell, output
    biases = [value.detach() for key, value in cell.named_parameters() if "bias" in key]
    torch.testing.assert_close(sum(biases), expected[: len(biases[0])], rtol=0, atol=0)
    for gate in cell._cell.weight_hh_l0.detach().split(6):
        torch.testing.assert_close(gate @ gate.T, torch.eye(6), rtol=0, atol=1e-5)


# Cost


@pytest.mark.parametrize(
    ("name", "moves", "room"),
    [
        ("transformer", 5, 128),  # after 16, 32, 64 and 128 steps, then after each 64 more
        ("episodic", 5, 128),
        ("transformer-short", 12, 20),  # after 16 steps each
    ],
)
def test_a_step_writes_behind_the_others_and_does_not_copy_them(name, moves, room):
    _, states = walk(make_cell(name), make_inputs(batch=2, steps=200))
    histories = [state[-1] for state in states[1:]]
    moved = [a.keys.data_ptr() != b.keys.data_ptr() for a, b in itertools.pairwise(histories)]
    assert sum(moved) == moves
    assert max(history.keys.shape[1] for history in histories) == room


def test_a_history_that_is_not_the_newest_is_copied_before_it_is_written():
    """The rule by itself, with rows of different length."""
    history = History.empty(2, 1, 8, torch.zeros(()))
    entry = torch.ones(2, 1)
    first = history.append(entry, entry, None)
    second = first.append(2 * entry, 2 * entry, torch.tensor([True, False]))
    assert second.keys.data_ptr() == first.keys.data_ptr()
    other = first.append(7 * entry, 7 * entry, None)
    assert other.keys.data_ptr() != first.keys.data_ptr()
    third = second.append(3 * entry, 3 * entry, None)
    assert third.keys.data_ptr() == second.keys.data_ptr()
    assert [state.lengths.tolist() for state in (history, first, second, other, third)] == [
        [0, 0],
        [1, 1],
        [2, 1],
        [2, 2],
        [3, 2],
    ]
    assert third.keys[0, :3, 0].tolist() == [1.0, 2.0, 3.0] and third.keys[1, :2, 0].tolist() == [1.0, 3.0]
    assert other.keys[:, :2, 0].tolist() == [[1.0, 7.0], [1.0, 7.0]]
    assert replace(third, context=2).window().keys[:, :, 0].tolist() == [[2.0, 3.0], [1.0, 3.0]]
