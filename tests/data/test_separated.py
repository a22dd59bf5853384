"""Tab-separated files: with quotes around fields as csv and pandas write them, and quotes in the text as in GLUE."""

import csv
import io
import warnings

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_ggpo.data import DataConfig, LabelReader
from lora_ggpo.data.files import parse_csv, parse_tsv
from lora_ggpo.errors import UserError
from tests.data import glue

# What GLUE's files hold and quoted files do not: quotes that open, close, or stand in the text by chance.
STRAY = [
    '"To be sure, he said.',
    'He said "no" twice.',
    '"Whole and quoted."',
    'It ends here."',
    '"',
    'a "b',
    '"no" is',
]


def rows_of(path, content, parse=parse_tsv, **options):
    table = parse(path, content.encode(), **options)
    return [list(row) for row in zip(*table.columns.values(), strict=True)]


def joined(rows):
    return "".join("\t".join(row) + "\n" for row in rows)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_quotes_in_the_text_of_an_unquoted_file_are_text(mark, end, tmp_path):
    rows = [[text, f"{text} again", str(n % 2)] for n, text in enumerate(STRAY)]
    content = mark + joined([["one", "two", "label"], *rows]).replace("\n", end)
    assert rows_of(tmp_path / "a.tsv", content) == rows


@pytest.mark.parametrize("text", STRAY)
def test_one_stray_quote_changes_nothing(text, tmp_path):
    rows = [[f"plain {n}", "0"] for n in range(3)]
    rows[1][0] = text
    assert rows_of(tmp_path / "a.tsv", joined([["text", "label"], *rows])) == rows


def test_a_quote_that_is_closed_seven_rows_later_swallows_none_of_them(tmp_path):
    rows = [[f"text {n}", str(n % 2)] for n in range(24)]
    rows[4][0], rows[11][0] = f'"{rows[4][0]}', f'{rows[11][0]}"'
    with pytest.warns(UserWarning, match=r"a\.tsv, line 6: the quote is read as part .* line to 13 is a row"):
        assert rows_of(tmp_path / "a.tsv", joined([["text", "label"], *rows])) == rows


def test_rows_that_a_quote_may_enclose_are_refused_where_a_line_is_damaged(tmp_path):
    lines = ["text\tlabel", *(f"text {n}\t0" for n in range(10))]
    lines[3], lines[5], lines[7] = f'"{lines[3]}', "damaged", lines[7].replace("\t", '"\t')
    message = r"a\.tsv, line 4: a quote opens here and closes on line 8, .* line 6 has 1 field and the first 2 fields"
    with pytest.raises(UserError, match=message):
        parse_tsv(tmp_path / "a.tsv", "\n".join(lines).encode())


CHARACTERS = st.text(alphabet='ab ,"\t\n', max_size=12)
WIDE = st.integers(1, 3).flatmap(
    lambda width: st.lists(st.lists(CHARACTERS, min_size=width, max_size=width), min_size=1, max_size=5)
)


@given(rows=WIDE, quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC]))
def test_what_csv_writes_comes_back_or_a_message_names_the_line(rows, quoting, tmp_path_factory):
    header = ["one", "two", "three"][: len(rows[0])]
    file = io.StringIO(newline="")
    csv.writer(file, delimiter="\t", quoting=quoting, lineterminator="\n").writerows([header, *rows])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            read = rows_of(tmp_path_factory.getbasetemp() / "a.tsv", file.getvalue())
        except UserError as error:
            caught.append(error)
    if quoting == csv.QUOTE_MINIMAL and caught:
        assert "line" in str(getattr(caught[0], "message", caught[0]))
    else:
        assert read == rows


def test_a_file_that_excel_writes_quotes_commas(tmp_path):
    content = 'text\tlabel\n"Well, yes"\t1\nno commas\t0\n"He said ""no"""\t0\n'
    assert rows_of(tmp_path / "a.tsv", content) == [["Well, yes", "1"], ["no commas", "0"], ['He said "no"', "0"]]


def test_pandas_tabs_and_line_breaks(tmp_path):
    frame = pandas.DataFrame({"text": ["a\tb\nc\td", "two\nlines", 'say "x"', "plain"], "label": ["0", "1", "0", "1"]})
    frame.to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    assert rows_of(tmp_path / "a.tsv", (tmp_path / "a.tsv").read_text()) == frame.values.tolist()


@pytest.mark.parametrize(("parse", "mark"), [(parse_csv, ","), (parse_tsv, "\t")])
def test_columns_of_a_file_without_a_header_are_named_by_the_recipe(parse, mark, tmp_path):
    rows = [["a", "0"], ["b", "1"]]
    content = joined(rows).replace("\t", mark)
    assert rows_of(tmp_path / "a", content, parse, columns=["text", "label"]) == rows
    with_header = f"text{mark}label\n{content}"
    assert rows_of(tmp_path / "a", with_header, parse, columns=["text", "label"]) == rows
    with pytest.raises(UserError, match=r"line 1: 2 fields, but data\.columns names 1\."):
        parse(tmp_path / "a", content.encode(), columns=["text"])


@pytest.mark.parametrize("source", ["movie-reviews", "some/hub-id", "rows.jsonl"])
def test_columns_are_for_separated_files_alone(source, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 1}\n')
    place = str(tmp_path / source) if source.endswith("jsonl") else source
    with pytest.raises(UserError, match=r"data\.columns is for CSV and TSV files without a header, but .* drop it"):
        LabelReader.load(DataConfig(source=place, columns=["text", "label"]))


def test_a_first_row_that_was_taken_for_the_header_is_suspected(tmp_path):
    (tmp_path / "a.tsv").write_text("0\tsome text\n1\tother text\n")
    with pytest.raises(
        UserError, match=r"no column 'label', .* If the file has no header, name its columns with data\.c"
    ):
        LabelReader.load(DataConfig(source=str(tmp_path / "a.tsv")))


@pytest.mark.parametrize("subset", glue.RAW)
def test_glue_as_it_is_distributed(subset, tmp_path):
    texts, label = glue.RAW[subset]
    glue.save_raw(tmp_path / subset, subset)
    columns = dict(zip(("text", "text_pair"), texts, strict=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # test labels are withheld
        place = str(tmp_path / subset)
        splits = LabelReader.load(DataConfig(source=place, label=label, test_split="validation", **columns))
    given = {split: glue.raw_rows(subset, split) for split in ("train", "dev")}
    held_out = [row[-1] for row in given["dev"]]
    assert sorted(splits.test["text_pair" if len(texts) == 2 else "text"]) == sorted(held_out)
    assert len(splits.train) + len(splits.validation) == len(given["train"])
    assert [splits.labels[index] for index in splits.test["label"]] == [row[0] for row in given["dev"]]


# --- a stray pair of quotes ----------------------------------------------------------------------------------------

ENCLOSING = {
    "at the ends of texts": ('text,label\nx,0\n"good,0\nfine,1\nbad",1\ny,1\nz,0\nv,1\n', 3, 5, 5),
    "label first": ('label,text\n0,x\n1,y\n0,"good\n1,bad"\n1,z\n0,v\n', 4, 5, 5),
    "of two texts": ('prompt,completion\n"a,b\nc,d\ne",f\ng,h\n', 2, 4, 2),
}


@pytest.mark.parametrize("name", ENCLOSING)
def test_quotes_that_enclose_what_looks_like_rows_are_named(name, tmp_path):
    content, first, last, rows = ENCLOSING[name]
    with pytest.warns(
        UserWarning, match=rf"a\.csv, line {first}: a quote opens here and closes on line {last}, "
    ) as told:
        table = parse_csv(tmp_path / "a.csv", content.encode())
    assert len(told) == 1
    assert len(table) == rows  # as csv and pandas have it
    assert len(pandas.read_csv(io.StringIO(content))) == rows


def test_all_such_places_are_counted(tmp_path):
    content = "text,label\n" + "".join(f'x{n},0\ny{n},1\n"a,0\nb",1\n' for n in range(3))
    with pytest.warns(UserWarning, match=r"So do 2 other records\."):
        parse_csv(tmp_path / "a.csv", content.encode())


@pytest.mark.parametrize(
    "content",
    [
        'text,label\n"two lines, as in\na verse",0\nx,0\ny,1\nz,1\nv,0\n',  # each line has a comma, but no label
        'label,text\n0,"a verse\nof two lines, with a comma"\n0,x\n1,y\n1,z\n0,v\n',
        'text\n"two\nlines"\nx\ny\n',
        'prompt,completion\n"two lines, as\na prompt has",x\ny,z\n',
    ],
)
def test_texts_of_several_lines_are_no_rows(content, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_csv(tmp_path / "a.csv", content.encode())
