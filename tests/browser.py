"""Headless Chromium, controlled through a pair of pipes: no server, no driver, no network."""

import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager

import pytest

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BINARY is None, reason="there is no chromium here: apt install chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]


class Browser:
    """A page in a browser whose files all lie in ``folder``; what it downloads is in ``folder/downloads``."""

    def __init__(self, folder, size="1000,700"):
        self.downloads = folder / "downloads"
        self.downloads.mkdir(parents=True)
        read_end, self._commands = os.pipe()
        self._answers, write_end = os.pipe()
        words = [BINARY, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={size}", "about:blank"]
        # the browser reads from descriptor 3 and writes to 4
        command = ["bash", "-c", f'exec "$@" 3<&{read_end} 4>&{write_end}', "bash", *words]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, pass_fds=(read_end, write_end), **quiet)
        os.close(read_end)
        os.close(write_end)
        self._number, self._rest, self._session = 0, b"", None

    def __enter__(self):
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
        return self

    def __exit__(self, *error):
        os.close(self._commands)  # which ends the browser
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._answers)

    def call(self, method, **params):
        """The result of one command of the DevTools protocol."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._number, "method": method, "params": params, **session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self):
        while b"\0" not in self._rest:
            part = os.read(self._answers, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, path):
        self.call("Page.navigate", url=path.absolute().as_uri())
        wait_until(lambda: self.read("document.readyState === 'complete' && location.protocol === 'file:'"))
        drawn = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        self.call("Runtime.evaluate", expression=drawn, awaitPromise=True)  # keys pressed before that may be lost

    @contextmanager
    def second(self, path):
        """A second window that shows ``path`` and gets all calls meanwhile; the first one stays as it is."""
        first, self._session = self._session, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.open(path)
        yield
        self._session = None
        self.call("Target.closeTarget", targetId=target)
        self._session = first

    def read(self, expression):
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, *keys, control=False):
        """Press and release keys: characters, or names such as ``Backspace``."""
        for key in keys:
            code = {"Enter": 13, "Backspace": 8, "ArrowLeft": 37, "ArrowRight": 39, "Delete": 46}.get(key, 0)
            text = {"text": key} if len(key) == 1 and not control else {}
            event = {"key": key, "modifiers": 2 if control else 0, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type="keyDown", **event, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def click(self, selector):
        """Click in the middle of an element."""
        box = self.read(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
                        f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())")  # fmt: skip
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def downloaded(self, name):
        """The path of a downloaded file, once it is complete."""
        path = self.downloads / name
        wait_until(lambda: path.is_file() and path.stat().st_size)  # it is created empty
        return path


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)
