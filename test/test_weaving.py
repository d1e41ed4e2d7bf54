"""What the patch tool reads and what it makes of upstream's text: woven functions, inserted test classes."""

import fake_pytorch as fake
import pytest
from patchset.classes import insert_classes
from patchset.errors import PatchError
from patchset.series import tomllib
from patchset.weave import weave


EDITS = tomllib.loads(fake.EDITS)["edit"]


# --- weaving


def test_weave_only_inserts():
    woven = weave(fake.GRADCHECK, EDITS)
    kept = iter(woven.splitlines())
    assert all(line in kept for line in fake.GRADCHECK.splitlines())  # a subsequence
    assert len(woven.splitlines()) == len(fake.GRADCHECK.splitlines()) + 1 + 2 + 6 + 1
    assert b"            (two lines)\n        symmetric (bool): perturb symmetric\n            inputs only\n" in woven


def test_woven_function_is_upstreams_without_the_keyword():
    names = {}
    exec(weave(fake.GRADCHECK, EDITS), names)
    assert names["gradcheck"](None, None) == ["eps", "func", "inputs", "masked"]
    assert names["gradcheck"].__kwdefaults__["symmetric"] is False


def test_weave_keeps_carriage_returns_and_non_ascii_columns():
    text = fake.GRADCHECK.replace(b"masked: bool = False,", "masked: 'µ\f' = 'éè',".encode())
    assert weave(text.replace(b"\n", b"\r\n"), EDITS) == weave(text, EDITS).replace(b"\n", b"\r\n")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"def gradcheck", b"def other", "0 functions gradcheck"),
        (b"def gradgradcheck", b"def gradcheck", "2 functions gradcheck"),
        (b"    eps: float", b"    symmetric=1,\n    eps: float", "already has symmetric"),
        (b"bool = False,  #", b"bool = False  #", "a comma and the end of the line"),
        (b"        masked (bool): sparse only\n            (two", b"        x\n            (two", "no docstring entry"),
        (b"        eps (float): step", b"        masked (bool): twice", "2 entries for masked"),
        (b'    r"""Compare derivatives.\n', b'    x = r"""Compare derivatives.\n', "has no docstring"),
        (b"    *,\n    eps: float = 1e-6,\n", b"    eps: float = 1e-6,\n", "no keyword-only parameter"),
        (b"import math\n", b"import math\rx = 1\n", "carriage return"),
        (b"import math\n", b"import math(\n", "expected Python"),
        (b"import math\n", b"# \xff\n", "expected UTF-8"),
    ],
)
def test_weave_refuses_a_missing_or_ambiguous_anchor(old, new, message):
    assert old in fake.GRADCHECK
    with pytest.raises(PatchError, match=message.replace("(", r"\(")):
        weave(fake.GRADCHECK.replace(old, new, 1), EDITS)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"parameters": ["a=1"]}, "the keys"),
        ({"function": "gradcheck"}, "the keys"),
        ({"function": "gradcheck", "blocks": "pass"}, "the keys"),
        ({"function": "gradcheck", "parameters": ["a"]}, "parameter 'a'"),
        ({"function": "gradcheck", "parameters": ["a=1, b=2"]}, "parameter 'a=1, b=2'"),
        ({"function": "gradcheck", "docstring": "a"}, "docstring_after"),
        ({"function": "gradcheck", "docstring": 'a """', "docstring_after": ["eps"]}, "plain text"),
        ({"function": "gradcheck", "block": "if True:"}, "complete statements|expected Python"),
        ({"function": "gradcheck", "block": "x = '''a\nb'''"}, "changed its meaning"),
    ],
)
def test_weave_refuses_a_faulty_edit(edit, message):
    with pytest.raises(PatchError, match=message):
        weave(fake.GRADCHECK, [edit])


TABLE = b"import math\n\n\nlist_of: list = [\n    math.pi,\n]  # numbers\nother = 1\n"
AFTER = {"assignment": "list_of", "block": "import cmath\nlist_of += [cmath.pi]"}


def test_weave_after_an_assignment():
    woven = weave(TABLE, [AFTER])
    assert woven == TABLE.replace(b"# numbers\n", b"# numbers\nimport cmath\nlist_of += [cmath.pi]\n")
    plain = TABLE.replace(b"list_of: list", b"list_of")
    assert weave(plain, [AFTER]) == woven.replace(b"list_of: list", b"list_of")
    assert weave(TABLE.replace(b"\n", b"\r\n"), [AFTER]) == woven.replace(b"\n", b"\r\n")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"list_of", b"table", "0 assignments to list_of"),
        (b"other = 1", b"list_of = 1", "2 assignments to list_of"),
        (b"]  # numbers\nother", b"]; other", "after the assignment"),
        (b"  # numbers\nother = 1\n", b"", "no end of line"),
    ],
)
def test_weave_refuses_a_missing_or_ambiguous_assignment(old, new, message):
    assert old in TABLE
    with pytest.raises(PatchError, match=message):
        weave(TABLE.replace(old, new), [AFTER])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"assignment": "list_of"}, "the keys"),
        ({**AFTER, "function": "f"}, "the keys"),
        ({**AFTER, "block": "x = ("}, "complete statements|expected Python"),
    ],
)
def test_weave_refuses_a_faulty_edit_of_an_assignment(edit, message):
    with pytest.raises(PatchError, match=message):
        weave(TABLE, [edit])


# --- test classes


def test_classes_go_before_main_with_their_imports():
    result = insert_classes(fake.THEIR_TESTS, fake.OUR_TESTS, ["TestSymmetric"]).decode()
    inserted = result[result.index("import math") : result.index("if __name__")]
    assert "    pass\n\n\nimport math" in result
    assert inserted.startswith("import math\n\nfrom torch.autograd import gradcheck\n\n\n# What a comment")
    assert result.replace("\n" + inserted, "").encode() == fake.THEIR_TESTS
    assert "\nenlist(TestSymmetric)\n" in inserted
    assert "TestElsewhere" not in inserted
    assert "import torch\n" not in inserted  # upstream's file has it
    theirs = fake.THEIR_TESTS.replace(b"import torch\n", b"import torch\nimport torch.nn\n")
    assert inserted in insert_classes(theirs, fake.OUR_TESTS, ["TestSymmetric"]).decode()


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (fake.THEIR_TESTS.replace(b"'__main__'", b"'main'"), fake.OUR_TESTS, "0 times if __name__"),
        (fake.THEIR_TESTS.replace(b"TestTheirs", b"TestSymmetric"), fake.OUR_TESTS, "already defines TestSymmetric"),
        (fake.THEIR_TESTS, b"import torch\n", "no TestSymmetric"),
        (fake.THEIR_TESTS, b"helper = 1\n" + fake.OUR_TESTS.replace(b"()):", b"helper)):"), "need helper"),
        (b"import x as math\n" + fake.THEIR_TESTS, fake.OUR_TESTS, "binds math otherwise"),
    ],
)
def test_classes_refuse_clashes_and_unmet_needs(theirs, ours, message):
    if b"helper" in ours:
        ours = ours.replace(b"gradcheck(torch.sin, ())", b"helper")
    with pytest.raises(PatchError, match=message):
        insert_classes(theirs, ours, ["TestSymmetric"])
