import pickle

from lora_ggpo.errors import DivergedError, UserError, causes


def test_a_message_is_one_line_whatever_it_quotes():
    error = UserError("no column 'a\nb\x1b[2J\ud800\u2028', its columns are naïve, 字.")
    assert str(error) == "no column 'a\\nb\\x1b[2J\\ud800\\u2028', its columns are naïve, 字."
    assert str(DivergedError(str(error))) == str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_causes_are_told_once_also_where_they_lead_back():
    first, second = OSError("disk"), ValueError("file")
    second.__cause__ = first
    assert list(causes(second)) == [second, first]
    first.__context__ = second
    assert list(causes(second)) == [second, first]
    second.__cause__ = second  # what `raise second from second` leaves
    assert list(causes(second)) == [second]
    assert list(causes(None)) == []
