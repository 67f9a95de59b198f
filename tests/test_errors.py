import pytest

from owl_det.errors import DataError, SourceError, UserError


@pytest.mark.parametrize("between", ["\n", "\r\n", "\n    ", "\u2028"])
def test_a_message_is_one_line(between: str) -> None:
    error = DataError(f"a{between}b.yaml: is not valid YAML: while scanning{between}  in line 2")
    assert isinstance(error, UserError)
    assert str(error) == "a b.yaml: is not valid YAML: while scanning in line 2"
    assert f"{error}" == str(error)
    assert str(SourceError(f"a{between}b", keys="c", flags="d")) == "a b; c"


def test_a_message_of_one_line_stays_as_it_is() -> None:
    assert str(DataError("  a.txt:  two  spaces ")) == "a.txt:  two  spaces"
    assert str(DataError("")) == ""
