"""The live page: what its server answers, as logs grow, are replaced or vanish, and to requests
that no browser of the reader's would make."""
import contextlib
import http.client
import json
import os
import re
import socket
import threading

import pytest

import probe
from plumbing import live
from plumbing.commands import UserError
from plumbing.compare import COSTS
from plumbing.live import PAGE, describe, has_display, new_lines, open_server, serve

SETTINGS = {"name": "mine", "size": "11m", "steps": 5, "vocab_size": 300, "seed": 2, "n_way": 4,
            "unigram": 4.5, "bigram": 4.0, "meta": True, "corpus_sha256": "ab"}


@pytest.fixture
def run(tmp_path):
    """The folder of a run with a log of two lines."""
    return make_run(tmp_path / "mine")


def make_run(folder, **changes):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SETTINGS | changes))
    (folder / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    return folder


@contextlib.contextmanager
def serving(*folders):
    """The port of a server of these runs, which ends with the block."""
    server = open_server(list(folders), 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(port, path, method="GET", **headers):
    """(status, headers, body) of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers=headers)
    reply = connection.getresponse()
    body = reply.read()
    connection.close()
    return reply.status, reply.headers, body


def ask_json(port, path):
    status, headers, body = ask(port, path)
    assert status == 200
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    return json.loads(body)


# ---- what is served ----------------------------------------------------------------------------

def test_the_page_is_served_with_headers_that_keep_it_to_itself(run):
    with serving(run) as port:
        status, headers, body = ask(port, "/")
    assert status == 200
    assert body == PAGE.read_bytes()
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "X-Frame-Options" not in headers  # a notebook may show it in a frame


def test_the_page_loads_nothing_from_elsewhere():
    page = PAGE.read_text()
    assert not re.search(r"https?:|//[a-z]|\bsrc=|@import|url\(", page)
    assert re.findall(r'href="([^"]*)"', page) == ["data:,"]
    # What a run is called must never become HTML.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", page)
    assert max(map(len, page.split("\n"))) <= 100


def test_runs_are_described_in_the_order_of_the_command(run, tmp_path):
    other = make_run(tmp_path / "other", name="</script>", meta=False)
    with serving(other, run) as port:
        second, first = ask_json(port, "/runs")
    assert first == {"name": "mine", "size": "11m", "kind": "meta", "text": "ab", "steps": 5,
                     "seed": 2, "vocab_size": 300, "n_way": 4, "inner_steps": None,
                     "unigram": 4.5, "bigram": 4.0, "chance": 0.25}
    assert (second["name"], second["kind"]) == ("</script>", "vanilla")


def test_settings_of_any_kind_are_described(tmp_path):
    wild = {"name": "x" * 900_000, "unigram": float("nan"), "bigram": [[1]], "n_way": "4",
            "inner_steps": 10 ** 20}
    description = describe(make_run(tmp_path / "wild", **wild))
    assert len(description["name"]) == 40
    for name in ("unigram", "bigram", "n_way", "inner_steps"):
        assert description[name] is None
    json.dumps(description, allow_nan=False)
    # Runs of before have neither of the two.
    (tmp_path / "wild" / "config.json").write_text('{"size": "11m", "vocab_size": 300}')
    assert describe(tmp_path / "wild")["bigram"] is None


def test_settings_are_read_again_and_kept_if_they_vanish(run):
    with serving(run) as port:
        (run / "config.json").write_text(json.dumps(SETTINGS | {"steps": 9}))
        assert ask_json(port, "/runs")[0]["steps"] == 9
        (run / "config.json").unlink()
        assert ask_json(port, "/runs")[0]["steps"] == 9


def test_the_page_names_costs_as_the_comparison_does():
    page = PAGE.read_text()
    for key, name in COSTS.items():
        assert f'{key}: "{name}"' in page


# ---- logs --------------------------------------------------------------------------------------

def follow(port, reply=None):
    """What a page that knows `reply` asks for next."""
    path = "/runs/0"
    if reply:
        path += f"?from={reply['next']}&mark={reply['mark']}"
    return ask_json(port, path)


def test_a_log_is_followed_as_it_grows(run):
    log = run / "metrics.jsonl"
    with serving(run) as port:
        first = follow(port)
        assert first["lines"] == ['{"step": 0}', '{"step": 1}']
        assert (first["from"], first["next"], first["more"]) == (0, log.stat().st_size, False)
        assert follow(port, first)["lines"] == []
        with open(log, "a") as file:
            file.write('{"step": 2}\n{"st')  # the second line is not whole yet
            file.flush()
            second = follow(port, first)
            assert second["from"] == first["next"]
            assert second["lines"] == ['{"step": 2}']
            assert follow(port, second)["lines"] == []
            file.write('ep": 3}\n')
            file.flush()
        third = follow(port, second)
        assert third["from"] == second["next"]
        assert third["lines"] == ['{"step": 3}']


@pytest.mark.parametrize("content", ['{"step": 7}\n{"step": 8}\n{"step": 9}\n',  # as long
                                     '{"step": 0}\n',                            # shorter
                                     '{"step": 0}\n{"stop": 1}\n{"step": 2}\n{"step": 3}\n'])
def test_a_log_that_was_replaced_is_read_from_its_beginning(run, content):
    with serving(run) as port:
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"step": 2}\n')
        first = follow(port)
        (run / "new").write_text(content)
        (run / "new").replace(run / "metrics.jsonl")
        second = follow(port, first)
        assert second["from"] == 0
        assert second["lines"] == content.splitlines()
        assert follow(port, second)["from"] == second["next"]


def test_a_log_is_not_read_again_where_only_the_file_was_replaced(run):
    log = run / "metrics.jsonl"
    with serving(run) as port:
        first = follow(port)
        (run / "new").write_text(log.read_text() + '{"step": 2}\n')
        (run / "new").replace(log)
        assert follow(port, first)["lines"] == ['{"step": 2}']


def test_a_log_that_is_gone_is_empty_and_may_come_back(run):
    log = run / "metrics.jsonl"
    with serving(run) as port:
        first = follow(port)
        log.unlink()
        second = follow(port, first)
        assert (second["from"], second["next"], second["lines"]) == (0, 0, [])
        os.mkfifo(log)  # reading it would wait for ever
        assert follow(port, second)["lines"] == []
        log.unlink()
        log.mkdir()
        assert follow(port, second)["lines"] == []
        log.rmdir()
        log.write_text('{"step": 5}\n')
        assert follow(port, second)["lines"] == ['{"step": 5}']


def test_a_long_log_comes_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "MOST_BYTES", 30)
    log = tmp_path / "metrics.jsonl"
    texts = [json.dumps({"step": step}) for step in range(20)]
    texts[3] = "x" * 100  # longer than a piece: its beginning is passed over
    log.write_text("".join(text + "\n" for text in texts))
    lines, reply = [], {"next": 0, "mark": "0"}
    for _ in range(40):
        reply = new_lines(log, reply["next"], reply["mark"])
        assert sum(map(len, reply["lines"])) < 30
        assert reply["lines"] or reply["more"]
        lines += reply["lines"]
        if not reply["more"]:
            break
    assert reply["next"] == log.stat().st_size
    assert lines[:3] == texts[:3]
    assert set(lines[3]) == {"x"}
    assert lines[4:] == texts[4:]


def test_bytes_of_any_kind_are_sent_as_json(run):
    damaged = b'{"step": NaN}\n\xff\xfe\x00\n</script>\n\n\xe2\x80\xa8{"a": "\\ud800"}\n'
    (run / "metrics.jsonl").write_bytes(damaged)
    with serving(run) as port:
        reply = follow(port)
    assert len(reply["lines"]) == 5
    assert reply["lines"][0] == '{"step": NaN}'
    assert reply["lines"][4] == '\u2028{"a": "\\ud800"}'
    assert reply["next"] == len(damaged)


# ---- requests that are refused -----------------------------------------------------------------

@pytest.mark.parametrize("path", [
    "/favicon.ico", "/runs/", "/runs/1", "/runs/-1", "/runs/99999", "/runs/0/../0", "/runs/00000",
    "/runs/../config.json", "/../../etc/passwd", "/%2e%2e/config.json", "/runs/0?from=-5&mark=0",
    "/runs/0?from=1", "/runs/0?from=1&mark=/etc", "/runs?x", "/live.html", "/runs/\xb2",
    "http://127.0.0.1/runs", "*"])
def test_anything_else_is_not_found(run, path):
    with serving(run) as port:
        reply = send(port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode("latin-1"))
    assert reply.startswith(b"HTTP/1.0 404 Not Found\r\n")
    assert b"nosniff" in reply


@pytest.mark.parametrize("method", ["POST", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "get"])
def test_other_methods_are_refused(run, method):
    with serving(run) as port:
        status, headers, _ = ask(port, "/runs", method)
    assert status == 405
    assert headers["Allow"] == "GET"
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_a_reply_to_head_has_no_body(run):
    with serving(run) as port:
        reply = send(port, b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert reply.startswith(b"HTTP/1.0 405 ")
    assert reply.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("host, status", [
    ("localhost", 200), ("127.0.0.1:9000", 200), ("LOCALHOST:1", 200), ("[::1]:80", 200),
    ("evil.example", 403), ("localhost.evil.example", 403), ("127.0.0.1.evil.example:80", 403),
    ("evil.example:80@localhost", 403), ("", 403)])
def test_only_names_of_this_machine_are_answered(run, host, status):
    with serving(run) as port:
        for path in ("/", "/runs", "/runs/0"):
            assert ask(port, path, Host=host)[0] == status


def send(port, request):
    """The reply to some bytes; b"" if the server ended the connection without one."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        reply = b""
        # The server need not read all of it.
        with contextlib.suppress(OSError):
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65536):
                reply += piece
        return reply


@pytest.mark.parametrize("request_bytes", [
    b"GET /" + b"x" * 1_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: " + b"x" * 100_000 + b"\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n", b"GET /\r\n\r\n", b"\r\n\r\n", b"", b"\x16\x03\x01\x00\x05hello",
    b"GET", b"GET / HTTP/1.1\r\nHost: localhost", b"\xff" * 1000 + b"\r\n\r\n"])
def test_the_server_survives_malformed_requests(run, request_bytes, capsys):
    with serving(run) as port:
        reply = send(port, request_bytes)
        assert b"200 OK" not in reply or request_bytes.startswith(b"GET / HTTP/1.1\r\nHost")
        assert ask(port, "/runs")[0] == 200
    assert "Traceback" not in capsys.readouterr().err


def test_a_silent_client_keeps_no_one_else_waiting(run):
    with serving(run) as port, socket.create_connection(("127.0.0.1", port)):
        assert ask(port, "/runs")[0] == 200


@pytest.mark.parametrize("error, is_said", [
    (ConnectionResetError(), False), (TimeoutError(), False), (ZeroDivisionError(), True)])
def test_a_browser_that_goes_away_is_no_error(run, error, is_said, capsys):
    with open_server([run], 0) as server:
        try:
            raise error
        except Exception:
            server.handle_error(None, ("127.0.0.1", 1))
    assert ("Traceback" in capsys.readouterr().err) == is_said


# ---- the command -------------------------------------------------------------------------------

def test_only_this_machine_is_served(run):
    with open_server([run], 0) as server:
        assert server.server_address[0] == "127.0.0.1"


def test_a_port_that_is_taken_is_said_or_passed_over(run, monkeypatch, capsys):
    with serving(run) as port:
        with pytest.raises(UserError, match=f"port {port} .*choose another --port"):
            open_server([run], port)
        monkeypatch.setattr(live, "PORT", port)
        with open_server([run], None) as server:
            assert port < server.server_address[1] <= port + live.PORTS
        assert f"port {port} is taken" in capsys.readouterr().err
        monkeypatch.setattr(live, "PORTS", 1)
        with pytest.raises(UserError, match=f"port {port} "):
            open_server([run], None)


def test_the_command_serves_the_runs_it_is_given(run, monkeypatch, capsys):
    """It ends at Ctrl-C, with exit code 130, and opens a browser only where there is a display."""
    opened, served = [], []

    def be_interrupted(server):
        served.extend(server.folders)
        raise KeyboardInterrupt

    monkeypatch.setattr(live.webbrowser, "open", opened.append)
    monkeypatch.setattr(live.Server, "serve_forever", be_interrupted)
    # A run that is named twice is served once.
    monkeypatch.setattr("sys.argv", ["probe.py", str(run), f"{run}/", "--live", "--port", "0"])
    for display in (False, True):
        monkeypatch.setattr(live, "has_display", lambda: display)
        with pytest.raises(SystemExit) as stopped:
            probe.main()
        assert stopped.value.code == 130
        printed = capsys.readouterr()
        address = re.match(r"http://127\.0\.0\.1:\d+/", printed.out)[0]
        assert printed.err == "probe.py: stopped.\n"
        assert opened == ([address] if display else [])
    assert served == [run, run]


def test_a_display_is_looked_for(monkeypatch):
    monkeypatch.setattr(live.sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert not has_display()
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert has_display()
    monkeypatch.delenv("WAYLAND_DISPLAY")
    monkeypatch.setattr(live.sys, "platform", "darwin")
    assert has_display()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run"):
        serve([tmp_path], 0)
