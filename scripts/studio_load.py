"""Many clients at once, then kills: the studio loses nothing and mixes nothing.

python scripts/studio_load.py --checkpoint DIR --clients 20 --seconds 120 --kills 20

Clients generate, regenerate and ask for candidates; one cancels, one uploads damaged images, one
drops its connections. Each answer is then made again alone, and must be the same bytes. Then the
server is killed at random moments, and every story must open again. Status 1 where it does not.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from contextualstory_jax.sampling.saved_story import SavedStory
from contextualstory_jax.studio.projects import Projects

WAIT = 300  # seconds, for an answer
NAMES, VERBS = ("mia", "otto", "zoe", "emil"), ("waves", "sits", "naps", "jumps")


class Server:
    """The studio in a process of its own."""

    def __init__(self, checkpoint: str | None, projects: Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "contextualstory_jax", "studio", "--port", str(port)]
        command += ["--projects", str(projects)]
        command += ["--checkpoint", checkpoint] if checkpoint else []
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("the studio is at"):
            raise RuntimeError(f"the studio did not start: {line}")
        self.base = f"http://127.0.0.1:{port}/gradio_api/call/v2"

    def memory(self) -> float:
        """Resident memory in MiB."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def kill(self) -> None:
        """End it as a power cut does."""
        self.process.kill()
        self.process.wait()


def call(base: str, name: str, **values: Any) -> Any:
    """An endpoint's answer, or its error as an exception; waits where too much is asked at once."""
    end = time.monotonic() + WAIT
    while True:
        with httpx.Client(timeout=WAIT) as client:
            event = client.post(f"{base}/{name}", json=values).raise_for_status().json()["event_id"]
            text = client.get(f"{base}/{name}/{event}").text
        kind, data = text.strip().split("\n\n")[-1].split("\n")
        answer = json.loads(data.removeprefix("data: "))
        if kind == "event: complete":
            return answer[0] if answer else None
        if "stories waiting" not in answer["error"] or time.monotonic() > end:
            raise ValueError(answer["error"])
        time.sleep(1)


def story(rng: random.Random) -> list[str]:
    """Sentences of a story."""
    return [f"{rng.choice(NAMES)} {rng.choice(VERBS)} ." for _ in range(rng.choice((3, 5, 5, 8)))]


class Client(threading.Thread):
    """A client that keeps what it asked and what it got."""

    def __init__(self, base: str, number: int, end: float, steps: int):
        super().__init__()
        self.base, self.number, self.end, self.steps = base, number, end, steps
        self.rng = random.Random(number)
        self.made: list[tuple[dict[str, Any], list[str]]] = []  # arguments of generate, frames
        self.links: dict[str, list[str]] = {}  # the last frames of each story
        self.answers = 0
        self.faults: list[str] = []

    def run(self) -> None:
        """Ask until the end."""
        while time.monotonic() < self.end:
            try:
                self.ask()
                self.answers += 1
            except Exception as error:  # of any kind: counted, and printed at the end
                self.faults.append(f"client {self.number}: {error!r}"[:300])

    def ask(self) -> None:
        """One request of this client's kind."""
        values = {"sentences": story(self.rng), "seed": self.rng.randrange(2**32)}
        values["steps"] = self.steps
        if self.number == 1:
            self.cancel(values)
        elif self.number == 2:
            self.upload_damaged(values)
        elif self.number == 3:
            with httpx.Client(timeout=WAIT) as client:  # closed at once; the story is generated
                client.post(f"{self.base}/generate", json=values)
            time.sleep(5)
        else:
            self.change(values)

    def change(self, values: dict[str, Any]) -> None:
        """Generate a story and regenerate a frame of it."""
        made = call(self.base, "generate", **values)
        if made["sentences"] != values["sentences"]:
            self.faults.append(f"client {self.number}: another's story")
        self.made.append((values, made["frames"]))
        frame = self.rng.randrange(len(made["frames"]))
        link, seed = made["story"], self.rng.randrange(2**31)
        if self.rng.random() < 0.3:
            call(self.base, "candidates", story=link, frames=[frame], count=3, seed=seed)
            after = made
        else:
            after = call(self.base, "regenerate", story=link, frames=[frame], seed=seed)
        for i, (old, new) in enumerate(zip(made["frames"], after["frames"], strict=True)):
            if i != frame and old != new:
                self.faults.append(f"client {self.number}: frame {i} was to stay")
        self.links[link] = after["frames"]

    def cancel(self, values: dict[str, Any]) -> None:
        """Cancel a story while it is generated; it must be as before."""
        made = call(self.base, "generate", **values)
        link = made["story"]
        long = threading.Thread(target=self.generate_long, args=(link, values))
        long.start()
        time.sleep(self.rng.random())
        call(self.base, "cancel", story=link)
        long.join()
        self.links[link] = call(self.base, "projects", stories=[link])[0]["frames"]

    def generate_long(self, link: str, values: dict[str, Any]) -> None:
        """A story of many steps, which is cancelled or, where that came too early, is not."""
        try:
            call(self.base, "generate", story=link, **{**values, "steps": 100})
        except ValueError as error:
            if str(error) != "cancelled":
                self.faults.append(f"client 1: {error}")

    def upload_damaged(self, values: dict[str, Any]) -> None:
        """An image that is none is refused, and changes nothing."""
        made = call(self.base, "generate", **values)
        try:
            call(self.base, "replace", story=made["story"], frame=0, image="iVBORw0KGgpicm9rZW4=")
            self.faults.append("client 2: a damaged image was taken")
        except ValueError:
            pass
        self.links[made["story"]] = made["frames"]


def load(arguments: argparse.Namespace, projects: Path) -> list[str]:
    """Run the clients, and make their stories again alone. Returns what went wrong."""
    server = Server(arguments.checkpoint, projects)
    # Compiles, and has the libraries that a change needs loaded, before memory is measured.
    first = call(server.base, "generate", sentences=["mia waves ."] * 8, steps=arguments.steps)
    call(server.base, "candidates", story=first["story"], frames=[0], count=3)
    end = time.monotonic() + arguments.seconds
    clients = [Client(server.base, n, end, arguments.steps) for n in range(arguments.clients)]
    memory = [server.memory()]
    for client in clients:
        client.start()
    time.sleep(arguments.seconds / 2)
    memory.append(server.memory())
    for client in clients:
        client.join()
    memory.append(server.memory())
    print(
        f"{sum(client.answers for client in clients)} answers of {len(clients)} clients in "
        f"{arguments.seconds:.0f} s; memory of the server in MiB: {memory[0]:.0f} at the start, "
        f"{memory[1]:.0f} in the middle, {memory[2]:.0f} at the end",
        flush=True,
    )
    faults = [fault for client in clients for fault in client.faults]
    if memory[2] > memory[1] + arguments.memory:
        faults.append(f"memory has grown by {memory[2] - memory[1]:.0f} MiB since the middle")
    faults += compare(server, clients, arguments.again)
    server.kill()
    return faults


def compare(server: Server, clients: list[Client], again: int) -> list[str]:
    """Compare stories with what clients were answered, and some with themselves made alone."""
    faults = []
    for client in clients:
        for link, frames in client.links.items():
            if call(server.base, "projects", stories=[link])[0]["frames"] != frames:
                faults.append(f"client {client.number}: {link} is not what it was")
    made = [one for client in clients for one in client.made]
    chosen = random.Random(0).sample(made, min(len(made), again))
    for values, frames in chosen:
        if call(server.base, "generate", **values)["frames"] != frames:
            faults.append(f"other bytes alone: {values}")
    print(f"{len(chosen)} of {len(made)} stories made again alone", flush=True)
    return faults


def kills(arguments: argparse.Namespace, projects: Path) -> list[str]:
    """Kill the server at random moments, and open every story again."""
    rng, faults = random.Random(1), []
    for number in range(arguments.kills):
        server = Server(arguments.checkpoint, projects)
        client = Client(server.base, 10 + number, time.monotonic() + WAIT, arguments.steps)
        client.daemon = True
        client.start()
        while client.answers == 0 and not client.faults:
            time.sleep(0.01)
        time.sleep(2 * rng.random())
        server.kill()
        client.end = 0
        client.join()
        opened = Projects(projects)
        for project in opened.all():
            try:
                project.read()
                project.read_candidates()
                for version in (project.folder / ".versions").glob("[0-9]*"):
                    SavedStory.read(version)
            except Exception as error:
                faults.append(f"kill {number}: {project.folder.name}: {error!r}")
        found = {project.link: project for project in opened.all()}
        for link in client.links:
            if link not in found or found[link].read() is None:
                faults.append(f"kill {number}: {link} is lost")
    print(f"{arguments.kills} kills; {len(list(Projects(projects).all()))} stories open")
    return faults


def main() -> int:
    """Run the load and the kills."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", help="default: the model that ships")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--again", type=int, default=50, help="stories to make again alone")
    parser.add_argument("--memory", type=float, default=100, help="MiB that it may grow by")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        faults = load(arguments, Path(folder)) + kills(arguments, Path(folder))
    for fault in faults[:20]:
        print("FAULT:", fault)
    print(f"{len(faults)} faults")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
