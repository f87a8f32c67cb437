"""The syntax of layer groups, windows and anchors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ffmerge_fast as ff
from ffmerge_fast.merging.groups import anchor_of, format_layers, parse_layers, windows
from ffmerge_fast.models.sublayers import FFNs

STACKS = {1: ["decoder"], 2: ["encoder", "decoder"]}


def ffns(layers=8, stacks=1, **changed):
    """Descriptions of FFNs, without a model; `changed` maps "<stack>.<i>" with _ for the dot to other values."""
    made = []
    for stack in STACKS[stacks]:
        for i in range(layers):
            values = dict(d_ff=32, activation="gelu", gated=False, bias=True) | changed.get(f"{stack}_{i}", {})
            path = f"{stack}.layers.{i}"
            made.append(
                ff.FFNSublayer(
                    i,
                    stack,
                    path,
                    f"{path}.up",
                    f"{path}.down",
                    None,
                    False,
                    (path,),
                    16,
                    parameters=1,
                    nbytes=4,
                    **values,
                )
            )
    return FFNs(made)


@pytest.mark.parametrize(
    ("layers", "groups"),
    [
        ("4-7", [(4, 5, 6, 7)]),
        ("0-2,6-7", [(0, 1, 2), (6, 7)]),
        ("1+4+7", [(1, 4, 7)]),
        ("0-1+5", [(0, 1, 5)]),
        ("5+1", [(1, 5)]),
        (" 1 + 4 , 2-3 ", [(1, 4), (2, 3)]),
        ("decoder:2-4", [(2, 3, 4)]),
        ([2, 3], [(2, 3)]),
        ([[0, 1], [5, 3]], [(0, 1), (3, 5)]),
        ([range(3)], [(0, 1, 2)]),
        (range(2, 4), [(2, 3)]),
        ({"decoder": [[0, 1], [2, 3]]}, [(0, 1), (2, 3)]),
        ({"decoder": [0, 1]}, [(0, 1)]),
    ],
)
def test_every_spelling(layers, groups):
    assert parse_layers(layers, ffns()) == [("decoder", group) for group in groups]


def test_two_stacks_move_in_step_unless_one_is_named():
    both = [("encoder", (2, 3)), ("decoder", (2, 3))]
    assert parse_layers("2-3", ffns(stacks=2)) == both
    assert parse_layers("encoder:2-3,decoder:2-3", ffns(stacks=2)) == both
    assert parse_layers("encoder:0-1,decoder:4+6", ffns(stacks=2)) == [("encoder", (0, 1)), ("decoder", (4, 6))]
    assert parse_layers({"decoder": [[0, 1]]}, ffns(stacks=2)) == [("decoder", (0, 1))]
    assert format_layers(both, ["encoder", "decoder"]) == "encoder:2-3,decoder:2-3"


SYNTAX = "is not a group of layers; write '4-7'"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("22-", SYNTAX),
        ("9-3", "'9-3' runs backwards; write '3-9'"),
        ("a", SYNTAX),
        ("", SYNTAX),
        ("1-2-3", SYNTAX),
        ("1,,2", SYNTAX),
        ("-1", SYNTAX),
        ("1.5-2", SYNTAX),
        ("decoder:", SYNTAX),
        ("²-3", SYNTAX),
        ("0-9999999999", SYNTAX),
        ("encoder:0-1", "stack 'encoder' not in this model, which has decoder"),
        ("6-9", "decoder layer 8 does not exist; it has FFNs in 0-7"),
        ("3", "a group needs at least two different layers, got [3]"),
        ("3+3", "a group needs at least two different layers, got [3, 3]"),
        ("0-3,3-5", "decoder layer 3 is in two groups; groups must not overlap"),
        ([[0, 1], [1, 2]], "decoder layer 1 is in two groups"),
        ([], "or lists of layer numbers"),
        ([["0", "1"]], "or lists of layer numbers"),
        ([[]], "or lists of layer numbers"),
        (["0-1"], "or lists of layer numbers"),
        (5, "or lists of layer numbers"),
        ({}, "or lists of layer numbers"),
        ({"decoder": []}, "or lists of layer numbers"),
    ],
)
def test_bad_groups_get_one_clear_line(layers, message):
    with pytest.raises(ff.FFMergeError) as error:
        parse_layers(layers, ffns())
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(d_ff=48), "d_ff 32 and 48"),
        (dict(activation="relu"), "activation gelu and relu"),
        (dict(bias=False), "bias True and False"),
        (dict(gated=True, d_ff=64), "d_ff 32 and 64, gated False and True"),
    ],
)
def test_ffns_that_differ_are_refused_with_the_difference(change, message):
    with pytest.raises(ff.FFMergeError) as error:
        parse_layers("1-3", ffns(decoder_2=change))
    assert f"FFNs decoder.1 and decoder.2 differ ({message}); group equal FFNs" in str(error.value)
    assert parse_layers("0+1+3", ffns(decoder_2=change)) == [("decoder", (0, 1, 3))]


@pytest.mark.parametrize(("layers", "size"), [(12, 5), (36, 13), (32, 2), (6, 6)])
def test_there_are_n_minus_k_plus_1_windows(layers, size):  # acceptance fact 11
    found = windows(ffns(layers), size)
    assert found == [[("decoder", tuple(range(i, i + size)))] for i in range(layers - size + 1)]


def test_windows_of_two_stacks_are_in_step():
    found = windows(ffns(6, stacks=2), 3)
    assert len(found) == 4 and found[2] == [("encoder", (2, 3, 4)), ("decoder", (2, 3, 4))]
    uneven = FFNs(f for f in ffns(6, stacks=2) if f.stack == "encoder" or f.index < 4)
    assert len(windows(uneven, 3)) == 2


def test_windows_leave_out_ffns_that_do_not_fit_together():
    assert windows(ffns(6, decoder_2=dict(d_ff=48)), 3) == [[("decoder", (3, 4, 5))]]
    with pytest.raises(ff.FFMergeError, match="no 4 adjacent FFNs of this model have equal shapes"):
        windows(ffns(6, decoder_2=dict(d_ff=48)), 4)


@pytest.mark.parametrize("size", [1, 0, -2, 9])
def test_windows_that_do_not_fit_the_stack_are_refused(size):
    with pytest.raises(ff.FFMergeError, match=f"window: got {size}, wanted 2 to 8"):
        windows(ffns(8), size)


def test_anchors():
    assert [anchor_of((3, 4, 5, 6, 7), a) for a in ("first", "middle", "last")] == [3, 5, 7]
    assert [anchor_of((1, 4, 6, 9), a) for a in ("first", "middle", "last")] == [1, 6, 9]
    with pytest.raises(ff.FFMergeError, match="anchor: got 'best', wanted 'first', 'middle' or 'last'"):
        anchor_of((1, 2), "best")


@st.composite
def groupings(draw, stacks):
    """Disjoint groups of two or more layers out of twelve, per stack."""
    groups = []
    for stack in STACKS[stacks]:
        order = draw(st.permutations(range(12)))
        for size in draw(st.lists(st.integers(2, 4), min_size=1, max_size=3)):
            groups.append((stack, tuple(sorted(order[:size]))))
            order = order[size:]
    return groups


@pytest.mark.parametrize("stacks", [1, 2])
@given(data=st.data())
def test_format_and_parse_are_inverse(stacks, data):
    groups = data.draw(groupings(stacks))
    text = format_layers(groups, STACKS[stacks])
    assert parse_layers(text, ffns(12, stacks)) == groups


@given(text=st.text(alphabet="0123456789-+,: decoderx", max_size=12))
def test_any_text_parses_or_gets_one_line(text):
    try:
        groups = parse_layers(text, ffns())
    except ff.FFMergeError as error:
        assert "\n" not in str(error)
    else:
        assert parse_layers(format_layers(groups, ["decoder"]), ffns()) == groups
