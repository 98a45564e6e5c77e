from __future__ import annotations

import os
from pathlib import Path

import pytest

from mam2.engine.data.lists import read_column
from mam2.engine.data.sources import read_source
from mam2.engine.errors import UserError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def read(folder: Path, text: str, name: str = "list.csv") -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    """Paths relative to the folder and labels of a list in it, and the names of the labels."""
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    entries, classes, _ = read_source(folder / name)
    assert all(os.path.isabs(entry.path) for entry in entries)
    return [(os.path.relpath(entry.path, folder), entry.label) for entry in entries], classes


def found(folder: Path) -> list[tuple[str, int]]:
    return [(os.path.relpath(entry.path, folder), entry.label) for entry in read_source(folder).entries]


def test_class_folders_are_labels_in_the_order_of_their_names(tmp_path):
    touch(tmp_path / "wave" / "b.mp4", tmp_path / "archery" / "c.MP4", tmp_path / "wave" / "a.avi")
    touch(tmp_path / "README.md", tmp_path / "wave" / "list.csv", tmp_path / "wave" / ".hidden.mp4")
    assert found(tmp_path) == [("archery/c.MP4", 0), ("wave/a.avi", 1), ("wave/b.mp4", 1)]
    assert read_source(tmp_path).classes == ("archery", "wave")


def test_any_other_folder_is_searched_at_any_depth_without_labels(tmp_path):
    touch(
        tmp_path / "top.mp4", tmp_path / "x" / "one.mp4", tmp_path / "x" / "y" / "two.mkv", tmp_path / ".no" / "a.mp4"
    )
    assert found(tmp_path) == [("top.mp4", -1), ("x/one.mp4", -1), ("x/y/two.mkv", -1)]
    assert read_source(tmp_path).classes == ()


def test_folders_of_numbered_images_are_videos(tmp_path):
    for name in ("push/182040", "push/7", "pull/12"):
        touch(*(tmp_path / name / f"img_{number:05d}.jpg" for number in (1, 2)))
    assert found(tmp_path) == [("pull/12", 0), ("push/182040", 1), ("push/7", 1)]
    assert found(tmp_path / "push" / "7") == [(".", -1)]


def test_folders_that_are_numbers_are_classes_in_the_order_of_their_numbers(tmp_path):
    touch(*(tmp_path / name / "a.mp4" for name in ("0", "10", "9", "007")))
    assert read_source(tmp_path).classes == ("0", "007", "9", "10")
    # The videos stay in the order of their paths, by which runs and code caches number them.
    assert found(tmp_path) == [("0/a.mp4", 0), ("007/a.mp4", 1), ("10/a.mp4", 3), ("9/a.mp4", 2)]
    touch(tmp_path / "x" / "a.mp4")
    assert read_source(tmp_path).classes == ("0", "007", "10", "9", "x")


def test_images_are_found_whatever_their_names_and_formats(tmp_path):
    touch(*(tmp_path / "a" / f"frame ({number}).jpg" for number in (1, 2)))
    touch(*(tmp_path / "b" / f"{number}_left.TIF" for number in (1, 2)))
    touch(tmp_path / "c" / "one1.jpg", tmp_path / "c" / "other1.jpg")
    assert found(tmp_path) == [("a", -1), ("b", -1)]


@pytest.mark.parametrize("linked", ["wave", "waving"])
def test_two_class_folders_that_are_one_are_refused(tmp_path, linked):
    touch(tmp_path / "store" / "a.mp4", tmp_path / "data" / "run" / "b.mp4")
    (tmp_path / "data" / "wave").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "waving").symlink_to(tmp_path / "store")
    with pytest.raises(UserError, match="the class folders wave and waving are one folder"):
        read_source(tmp_path / "data")
    (tmp_path / "data" / linked).unlink()
    assert len(read_source(tmp_path / "data").classes) == 2


def test_of_a_folder_and_a_link_to_it_the_folder_is_read(tmp_path):
    touch(tmp_path / "z" / "y" / "one.mp4")
    os.symlink(tmp_path / "z", tmp_path / "a", target_is_directory=True)
    assert [name for name, _ in found(tmp_path)] == ["z/y/one.mp4"]


def test_posters_next_to_videos_are_not_frames(tmp_path):
    touch(tmp_path / "a" / "one.mp4", *(tmp_path / "a" / f"poster{number}.jpg" for number in (1, 2)))
    touch(tmp_path / "chart1.png", tmp_path / "chart2.png", tmp_path / "b" / "cover1.jpg")
    touch(tmp_path / "c" / "front.png", tmp_path / "c" / "back.png")
    assert found(tmp_path) == [("a/one.mp4", 0)]


def test_links_that_go_round_in_a_circle_end(tmp_path):
    touch(tmp_path / "x" / "one.mp4")
    os.symlink(tmp_path, tmp_path / "x" / "back", target_is_directory=True)
    assert [name for name, _ in found(tmp_path)] == ["x/one.mp4"]


def test_a_single_video_is_a_data_set(tmp_path):
    touch(tmp_path / "one.mp4")
    assert [entry.path for entry in read_source(tmp_path / "one.mp4").entries] == [str(tmp_path / "one.mp4")]


@pytest.mark.parametrize(
    ("line", "path", "label"),
    [
        ("a.mp4 3", "a.mp4", 3),
        ("with a space.mp4 3", "with a space.mp4", 3),
        ("a.mp4\t3", "a.mp4", 3),
        ("a.mp4,3", "a.mp4", 3),
        ("a, b.mp4, 3", "a, b.mp4", 3),
        ("a.mp4", "a.mp4", -1),
        ("a b.mp4", "a b.mp4", -1),
        ("a.mp4 -1", "a.mp4", -1),
        ("sub/a.mp4::3", "sub/a.mp4", 3),
        ("with a space.mp4::3", "with a space.mp4", 3),
        ("folder/182040 58 3", "folder/182040", 3),
        ("with a space/182040 58 3", "with a space/182040", 3),
        ("folder/182040\t58\t3", "folder/182040", 3),
        ("a.mp4 0 -1", "a.mp4", -1),
        ("here 12 3", "here 12", 3),  # a folder of that name lies there
        ('"a b.mp4" 3', "a b.mp4", 3),
        ('"a, ""b"".mp4",3', 'a, "b".mp4', 3),
        ('"clip 7" 58 3', "clip 7", 3),
        ('"clip 7"\t3', "clip 7", 3),
        ('"a, b.mp4"', "a, b.mp4", -1),
        ('"a b.mp4"::3', "a b.mp4", 3),
    ],
)
def test_each_form_of_a_line(tmp_path, line, path, label):
    (tmp_path / "here 12").mkdir()
    assert read(tmp_path, line + "\n")[0] == [(path, label)]


@pytest.mark.parametrize(
    "form",
    [
        *("{} {}", "{}\t{}", "{},{}", "{}::{}", '"{}",{}', '"{}", "{}"', '"{}" "{}"', '{}, "{}"', '{}\t"{}"'),
        *('"{}"::"{}"', '"{}" , "{}"'),
    ],
)
def test_names_are_labels_in_alphabetical_order(tmp_path, form):
    lines = [
        form.format(path, name) for path, name in (("a.mp4", "wave"), ("b.mp4", "baseball swing"), ("c.mp4", "wave"))
    ]
    entries, classes = read(tmp_path, "\n".join(lines))
    assert entries == [("a.mp4", 1), ("b.mp4", 0), ("c.mp4", 1)]
    assert classes == ("baseball swing", "wave")


def test_a_list_is_read_in_its_order_with_repeats_blank_lines_and_a_mark(tmp_path):
    elsewhere = tmp_path / "elsewhere" / "abs.mp4"
    text = f"\ufeffwith a space.mp4 4\r\nx.mp4\n\n{elsewhere}\t0\nx.mp4,2\n"
    entries, classes = read(tmp_path, text)
    assert entries == [("with a space.mp4", 4), ("x.mp4", -1), ("elsewhere/abs.mp4", 0), ("x.mp4", 2)]
    assert classes == ("0", "1", "2", "3", "4")


def test_names_that_are_not_utf_8_come_back_as_bytes(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xe2\x80\xa8.mp4")  # a Unicode line separator does not end a line
    assert read(tmp_path, f"{name} 1\n")[0] == [(name, 1)]


@pytest.mark.parametrize(
    "text",
    [
        "label\tpath\nwave\ta, b.mp4\narchery\tc.mp4\n\tc.mp4\n",
        'Filename,Class\n"a, b.mp4",wave\nc.mp4,archery\n\nc.mp4,\n',
        '"path", "category"\n"a, b.mp4", "wave"\nc.mp4 , archery\nc.mp4,\n',
        "video_path\tsplit\taction\na, b.mp4\t\twave\nc.mp4\t\tarchery\nc.mp4\t\t\n",
    ],
)
def test_a_list_with_a_header(tmp_path, text):
    entries, classes = read(tmp_path, text)
    assert entries == [("a, b.mp4", 1), ("c.mp4", 0), ("c.mp4", -1)]
    assert classes == ("archery", "wave")


def test_numbers_under_a_header_stay_what_they_are(tmp_path):
    assert read(tmp_path, "video,label\na.mp4,7\n")[0] == [("a.mp4", 7)]


SPLITS = "path,label,split\na.mp4,wave,train\nb.mp4,archery,val\nc.mp4,archery,train\n"


def test_a_split_column_chooses_rows_and_without_a_choice_a_line_says_so(tmp_path):
    assert read(tmp_path, SPLITS)[0] == [("a.mp4", 1), ("b.mp4", 0), ("c.mp4", 0)]
    listed = tmp_path / "list.csv"
    (note,) = read_source(listed).notes
    assert note == (f"{listed}: rows of all splits are used: train (2), val (1); {listed}:train selects one split")
    entries, classes, notes = read_source(f"{listed}:train")
    assert [(os.path.basename(entry.path), entry.label) for entry in entries] == [("a.mp4", 1), ("c.mp4", 0)]
    assert (classes, notes) == (("archery", "wave"), ())
    with pytest.raises(UserError, match=r"list\.csv:test: no row of this split; the list has train \(2\), val \(1\)"):
        read_source(f"{listed}:test")
    touch(tmp_path / "list.csv:train")  # a file of that name is meant
    with pytest.raises(UserError, match="the list is empty"):
        read_source(f"{listed}:train")


def test_a_split_of_a_list_without_such_a_column_is_refused(tmp_path):
    (tmp_path / "list.csv").write_text("a.mp4 0\n")
    with pytest.raises(UserError, match=r"list\.csv:train: the list has no column named split or subset"):
        read_source(f"{tmp_path / 'list.csv'}:train")
    with pytest.raises(UserError, match=r"nowhere\.csv:train: no such file or folder"):
        read_source(f"{tmp_path / 'nowhere.csv'}:train")


KINETICS = "label,youtube_id,time_start,time_end,split\nwave,-aB_0,1,11,train\nrun,xyz,130,140,train\nrun,qq,0,10,val\n"


def test_kinetics_own_list_finds_videos_by_their_usual_names(tmp_path):
    touch(tmp_path / "train" / "wave" / "-aB_0_000001_000011.mp4", tmp_path / "elsewhere" / "qq.mkv")
    assert read(tmp_path, KINETICS) == (
        [("train/wave/-aB_0_000001_000011.mp4", 1), ("xyz_000130_000140.mp4", 0), ("elsewhere/qq.mkv", 0)],
        ("run", "wave"),
    )
    assert len(read_source(f"{tmp_path / 'list.csv'}:train").entries) == 2


def test_kinetics_own_list_without_its_videos_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"official Kinetics list.*none of its 3 videos \(-aB_0_000001_000011\.mp4"):
        read(tmp_path, KINETICS)
    with pytest.raises(UserError, match="row 2: expected numbers as times, found soon, 11"):
        read(tmp_path, KINETICS.replace(",1,11", ",soon,11"))


def test_columns_that_are_not_used_are_named(tmp_path):
    (tmp_path / "list.csv").write_text("path,genre\na.mp4,wave\n")
    assert read_source(tmp_path / "list.csv").notes == (
        f"{tmp_path / 'list.csv'}: no column for labels; the columns genre are not used",
    )


@pytest.mark.parametrize(
    ("text", "notes"), [("a 0\nb 60000\n", 1), ("a 0\nb 1\nc\n", 0), ("a\nb\n", 0), ("a 1\nb 2\n", 0)]
)
def test_gaps_between_numbered_labels_are_told(tmp_path, text, notes):
    (tmp_path / "list.csv").write_text(text)
    found = read_source(tmp_path / "list.csv").notes
    assert len(found) == notes
    assert all("go up to 60000, of which 2 occur: 60001 classes" in note for note in found)


def test_a_cell_may_hold_a_line_end(tmp_path):
    assert read(tmp_path, 'path,label\n"two\nlines.mp4",1\n')[0] == [("two\nlines.mp4", 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the list is empty"),
        (b"\n \n", "the list is empty"),
        (b"\0\1\2", "not a text file"),
        (b"path,label\na.mp4,1\nb.mp4\n", "line 3 has 1 columns, the header has 2"),
        (b"path,label\na, b.mp4,1\n", "line 2 has 3 columns, the header has 2"),
        (b"path,label\n", "a header but no videos"),
        (
            b"clip_no,label\n7,1\n",
            r"the header \(clip_no, label\) has no column for the videos; expected one named path",
        ),
        (b"path,label\na.mp4,1\n,1\n", "line 3 names no video"),
        (b"a.mp4 1\n\n,1\n", "line 3 names no video"),
        (b"a.mp4::1\n::1\n", "line 2 names no video"),
        (b"a.mp4 0\nb.mp4 20261122\n", "line 2: label 20261122 is not a class"),
        (b"a.mp4 0\nb.mp4 -7\n", "line 2: label -7 is not a class"),
        (b"a.mp4 0\nb.mp4 1\nc.mp4 wave\n", "line 1 has the label 0, line 3 the label 'wave'"),
        (b"a.mp4 0.5\nb.mp4 1\nc.mp4 1.5 m\n", "line 2 has the label 1, line 1 the label '0.5'"),
        (b'path,label\n"' + b"x" * 200_000, "field larger than field limit"),
    ],
)
def test_an_unusable_list_is_one_clear_line(tmp_path, content, message):
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_source(tmp_path / "list.csv")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "list.csv") in str(caught.value)


def test_a_missing_or_empty_folder_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        read_source(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no videos in this folder"):
        read_source(tmp_path)


@pytest.mark.parametrize("table", ["nowhere.csv", "shards/{0..3}.tar"])
def test_a_column_of_no_list_is_one_line(tmp_path, table):
    with pytest.raises(UserError, match="no such file or folder; expected a list with a header"):
        read_column(tmp_path / table, "speaker")
