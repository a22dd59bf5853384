import pickle

from lora_ggpo.errors import DivergedError, UserError


def test_a_message_is_one_line_whatever_it_quotes():
    error = UserError("no column 'a\nb\x1b[2J\ud800\u2028', its columns are naïve, 字.")
    assert str(error) == "no column 'a\\nb\\x1b[2J\\ud800\\u2028', its columns are naïve, 字."
    assert str(DivergedError(str(error))) == str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
