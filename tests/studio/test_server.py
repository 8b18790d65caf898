"""The server refuses what it should before any route sees it, and answers in one line."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import sys

import pytest

from contextualstory_jax.commands import studio as command
from contextualstory_jax.studio import server
from contextualstory_jax.studio.limits import MOST_OF_BODY
from contextualstory_jax.utils.errors import UserError
from tests.helpers.studio import SENTENCES

HOST, PASSWORD = "127.0.0.1:7860", "se:cret é"


def basic(password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}


@pytest.fixture(scope="module")
def client(shared_studio):
    """A client that knows the password."""
    from starlette.testclient import TestClient

    app = server.make_app(shared_studio, "127.0.0.1", PASSWORD)
    with TestClient(app, base_url=f"http://{HOST}", headers=basic(PASSWORD)) as client:
        yield client


def call(client, name: str, **values):
    """The last event of an endpoint's answer: its name and data."""
    started = client.post(f"/gradio_api/call/v2/{name}", json=values)
    assert started.status_code == 200, started.text
    stream = client.get(f"/gradio_api/call/{name}/{started.json()['event_id']}").text
    event, data = stream.strip().split("\n\n")[-1].split("\n")
    return event.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def answer(client, name: str, **values):
    event, data = call(client, name, **values)
    assert event == "complete", data
    return data[0]


def refusal(client, name: str, **values) -> str:
    event, data = call(client, name, **values)
    assert event == "error", data
    return data["error"]


ROUTES = [
    "/",
    "/config",
    "/theme.css",
    "/assets/x.js",
    "/static/img/logo.svg",
    "/gradio_api/info",
    "/gradio_api/openapi.json",
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/startup-events",
    "/gradio_api/heartbeat/x",
    "/gradio_api/queue/data?session_hash=x",
    "/gradio_api/call/generate/x",
    "/gradio_api/upload_progress?upload_id=x",
    "/robots.txt",
    "/manifest.json",
    "/nothing",
]
POSTS = [
    "/gradio_api/call/generate",
    "/gradio_api/call/projects",
    "/gradio_api/call/export",
    "/gradio_api/queue/join",
    "/gradio_api/upload",
    "/gradio_api/cancel",
    "/gradio_api/component_server",
    "/login",
]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("login", [{}, basic("wrong"), {"Authorization": "Basic ?"}])
def test_no_route_answers_without_the_password(client, path, login):
    headers = {"Authorization": "", **login}

    answered = client.get(path, headers=headers)

    assert answered.status_code == 401
    assert answered.headers["www-authenticate"].startswith("Basic")


@pytest.mark.parametrize("path", POSTS)
def test_no_endpoint_is_called_without_the_password(client, path):
    headers = {"Authorization": "Bearer x"}
    assert client.post(path, json={"data": []}, headers=headers).status_code == 401


def test_the_page_is_answered_with_the_password(client):
    answered = client.get("/")

    assert answered.status_code == 200 and "ContextualStory studio" in answered.text
    assert "frame-ancestors 'none'" in answered.headers["content-security-policy"]
    assert "Access-Control-Allow-Origin" not in answered.headers


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:7860"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": ""},
        {"Host": "[::1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "http://localhost:7860"},
    ],
)
def test_other_sites_are_refused(client, headers):
    answered = client.post("/gradio_api/call/projects", json={"data": [[]]}, headers=headers)

    assert answered.status_code == 403 and answered.text.count("\n") == 1


@pytest.mark.parametrize("headers", [{"Host": "localhost:1"}, {"Origin": f"http://{HOST}"}])
def test_our_own_page_is_not_refused(client, headers):
    assert client.get("/config", headers=headers).status_code == 200


def test_a_body_over_20_mb_is_refused(client):
    large = b"x" * (MOST_OF_BODY + 1)

    declared = client.post("/gradio_api/upload", content=large)
    streamed = client.post("/gradio_api/call/projects", content=iter([large[:100], large]))

    assert declared.status_code == streamed.status_code == 413
    assert "20 MB" in declared.text


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/proxy=http://127.0.0.1:1/",
        "/gradio_api/vibe-code",
        "/gradio_api/dev/reload",
        "/gradio_api/run-history/buckets",
        "/gradio_api/deep_link",
        "/monitoring",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/assets/../../../../etc/passwd",
        "/assets/..%2f..%2f..%2f..%2fetc/passwd",
        "/static/..%2f..%2f..%2fetc/passwd",
        "/svelte/..%2f..%2f..%2f..%2fetc/passwd",
    ],
)
def test_files_and_developers_routes_are_not_served(client, path):
    answered = client.get(path)

    assert answered.status_code in (400, 403, 404)
    assert "root:" not in answered.text


def test_the_key_of_the_links_is_not_served(client, shared_studio):
    key = shared_studio.projects.folder / ".key"

    assert client.get(f"/gradio_api/file={key}").status_code in (403, 404)


@pytest.mark.parametrize(
    "name, values",
    [
        ("generate", {"sentences": SENTENCES}),
        ("regenerate", {"frames": [0]}),
        ("candidates", {"frames": [0]}),
        ("choose", {"number": 0}),
        ("replace", {"frame": 0, "image": "x"}),
        ("arrange", {"frames": [0]}),
        ("undo", {}),
        ("cancel", {}),
        ("projects", None),
        ("export", {"format": "pdf"}),
    ],
)
def test_links_that_are_made_up_are_refused_by_all_endpoints(client, name, values):
    link = "../other~x"
    values = {"stories": [link]} if values is None else {**values, "story": link}
    if name == "export":
        values["link"] = values.pop("story")

    assert "no story with this link" in refusal(client, name, **values)


def test_a_story_goes_through_all_endpoints(client, image_url):
    context = {"3": "Mia sleeps."}
    story = answer(client, "generate", sentences=SENTENCES, seed=3, steps=2, context=context)
    link = story["story"]
    assert story["context"] == context
    assert story["sentences"] == SENTENCES and story["seeds"] == [3] * 5
    assert all(frame.startswith("data:image/png;base64,") for frame in story["frames"])

    changed = answer(client, "regenerate", story=link, frames=[1], seed=4)
    assert changed["seeds"] == [3, 4, 3, 3, 3]
    assert [a == b for a, b in zip(changed["frames"], story["frames"], strict=True)] == [
        *(True, False, True, True, True)
    ]
    assert answer(client, "undo", story=link)["frames"] == story["frames"]
    assert answer(client, "redo", story=link)["frames"] == changed["frames"]
    assert len(answer(client, "candidates", story=link, frames=[0], count=2, seed=7)) == 2
    assert answer(client, "choose", story=link, number=1)["seeds"] == [8, 4, 3, 3, 3]
    assert answer(client, "replace", story=link, frame=4, image=image_url)["locked"] == [4]
    assert answer(client, "projects", stories=[link])[0]["seeds"] == [8, 4, 3, 3, None]
    arranged = answer(client, "arrange", story=link, frames=[0, 3, 4])
    assert arranged["seeds"] == [8, 3, None] and arranged["context"] == {"1": "Mia sleeps."}
    (file,) = answer(client, "export", link=link, format="pdf")["value"]
    assert client.get(file["url"].removeprefix(f"http://{HOST}")).content.startswith(b"%PDF")


def test_script_in_sentences_is_text(client, shared_studio):
    from contextualstory_jax.studio import html

    bad = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "${1+1} {{value}} `\\"]
    link = answer(client, "generate", sentences=bad, steps=1)["story"]

    saved = shared_studio.projects.find(link).read()
    for page in (html.strip(saved, []), html.candidates([saved, saved]), html.error(bad[0])):
        assert "<script" not in page and "<img src=x" not in page
        assert "${" not in page and "{{" not in page and "`" not in page and "\\" not in page
    assert "<script" not in html.stories([(link, bad[0])]) + html.notes(bad)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"sentences": []}, "story 'story' has no sentences; write at least one"),
        ({"sentences": ["a"] * 101}, "story 'story' has 101 sentences; write at most 100"),
        ({"sentences": ["a" * 10_000]}, "story 'story': sentence 0 has 10000 characters; write"),
        ({"sentences": "text"}, "sentences must be a list of strings"),
        ({"steps": 1000}, "steps must be an integer in 1..250; got 1000"),
        ({"keep": [7]}, "keep: no frame 7; they are numbered from 0 to 4"),
        ({"images": {"0": "eA=="}}, "the upload is not an image"),
        ({"model": "x"}, "model must be one of"),
        ({"context": {"5": "x"}}, "context: context of '5', which is no sentence's number"),
    ],
)
def test_bad_input_is_answered_in_one_line(client, values, message):
    line = refusal(client, "generate", **{"sentences": SENTENCES, **values})

    assert line.startswith(message) and "\n" not in line


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("candidates", {"frames": [0], "count": 0}, "candidates must be at least 1; got 0"),
        ("candidates", {"frames": [0], "count": 9}, "candidates must be an integer in 1..8; got 9"),
        ("regenerate", {"frames": [7]}, "frames[0] must be an integer in 0..4; got 7"),
        ("regenerate", {"frames": [0], "seed": -1}, "seed must be an integer in 0..4294967295"),
        ("replace", {"frame": 5, "image": ""}, "frame: no frame 5; they are numbered from 0 to 4"),
        ("arrange", {"frames": [0, 0]}, "frames: one is named twice"),
        ("choose", {"number": 0}, "there are no candidates; generate some"),
        ("undo", {}, "there is nothing to undo"),
    ],
)
def test_changes_that_are_none_are_answered_in_one_line(client, link, name, values, message):
    line = refusal(client, name, story=link, **values)

    assert line.startswith(message) and "\n" not in line


def test_a_story_of_a_newer_format_is_answered_in_one_line(client, link, shared_studio):
    projects = shared_studio.projects
    folder = projects.folder / "newer"
    shutil.copytree(projects.find(link).folder, folder)
    path = folder / "story.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    (newer,) = [project.link for project in projects.all() if project.folder == folder]

    assert "in format 99, and this version reads up to 1; update" in refusal(
        client, "projects", stories=[newer]
    )


def test_an_upload_is_not_fetched_from_elsewhere(client, link):
    for image in ("http://127.0.0.1:1/x.png", "file:///etc/passwd", "/etc/passwd"):
        assert "base64" in refusal(client, "replace", story=link, frame=0, image=image)


def test_without_a_password_local_requests_are_answered(shared_studio):
    guard = server.Guard(None, "127.0.0.1", None)

    assert guard._refuse("/", {"host": b"localhost:1"}) is None
    assert guard._refuse("/", {"host": b"evil.example"})[0] == 403


def test_an_open_host_goes_by_its_addresses_and_name():
    guard = server.Guard(None, "0.0.0.0", None)

    for host in ("192.168.1.5:7860", "[fe80::1]:7860", socket.gethostname()):
        assert guard._refuse("/", {"host": host.encode()}) is None
    assert guard._refuse("/", {"host": b"evil.example"})[0] == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "studio.example"])
def test_an_open_host_needs_a_password(host, tmp_path):
    with pytest.raises(UserError, match="--password") as error:
        command.main(["--host", host, "--projects", str(tmp_path / "p"), "--port", "0"])

    assert "\n" not in str(error.value) and not (tmp_path / "p").exists()


def test_a_port_in_use_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}: .*in use; choose another"):
            command.main(["--port", str(port), "--projects", str(tmp_path / "p")])

    assert not (tmp_path / "p").exists()


def test_without_gradio_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)

    with pytest.raises(UserError, match=r"pip install 'contextualstory-jax\[studio\]'"):
        command.main(["--port", "0", "--projects", str(tmp_path / "p")])


def test_an_unknown_checkpoint_is_named_and_leaves_no_folder(tmp_path):
    projects = tmp_path / "p"

    with pytest.raises(UserError, match="no folder nope"):
        command.main(["--port", "0", "--checkpoint", "nope", "--projects", str(projects)])

    assert not projects.exists()
