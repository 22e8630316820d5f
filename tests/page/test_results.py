"""Sessions: nobody gets another's, and what nobody wants any more goes."""

import json

from vdot.page.results import Sessions


def test_a_token_is_the_only_way_to_a_session(tmp_path):
    sessions = Sessions(tmp_path, hours=1, temporary=False)
    mine = sessions.open(None)
    assert sessions.open(mine.token) is mine
    for forged in (mine.folder.name, "../" + mine.token, mine.token.upper() + "0", "0" * 32, "", 7, None, ["x"]):
        assert sessions.open(forged) is not mine
    assert mine.token not in str(mine.folder)
    assert mine.folder.parent == tmp_path
    sessions.close()


def test_results_outlive_the_page_where_a_folder_was_given(tmp_path):
    sessions = Sessions(tmp_path, hours=1, temporary=False)
    session = sessions.open(None)
    folder = session.fresh("video")
    (folder / "page.json").write_text(json.dumps({"settings": {"prompt": "a cat"}, "facts": {"seed": 3}}))
    sessions.close()
    again = Sessions(tmp_path, hours=1, temporary=False)
    assert [result.settings for result in again.open(session.token).results] == [{"prompt": "a cat"}]
    again.close()


def test_untouched_sessions_are_deleted_and_busy_ones_kept(tmp_path):
    class Running:
        over = False

    sessions = Sessions(tmp_path, hours=1, temporary=False)
    old, busy, new = (sessions.open(None) for _ in range(3))
    for session in (old, busy, new):
        session.fresh("video")
    busy.ticket = Running()
    old.touched = busy.touched = new.touched - 7200
    assert sessions.sweep(new.touched) == 1
    assert not old.folder.exists() and busy.folder.exists() and new.folder.exists()
    sessions.close()


def test_a_temporary_folder_goes_with_the_page(tmp_path):
    root = tmp_path / "sessions"
    sessions = Sessions(root, hours=1, temporary=True)
    sessions.open(None).fresh("video")
    sessions.close()
    assert not root.exists()
