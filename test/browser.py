"""A real browser without a screen, told what to do through its DevTools protocol."""

import base64
import io
import json
import shutil
import subprocess
import time
import urllib.request

import numpy as np
from PIL import Image

BROWSER = next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
)
ARGUMENTS = (
    '--headless=new', '--no-sandbox', '--use-angle=swiftshader', '--enable-unsafe-swiftshader',
    '--ignore-gpu-blocklist', '--window-size=1000,700', '--remote-debugging-port=0',
)  # fmt: skip
DEADLINE_S = 600  # a busy machine took 208 s


class Browser:
    """Shows one page; use as a context manager."""

    def __init__(self, url, profile):
        command = [BROWSER, *ARGUMENTS, f'--user-data-dir={profile}', url]
        quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
        self._end = time.monotonic() + DEADLINE_S
        self._process = subprocess.Popen(command, **quiet)
        self._port_file, self._connection = profile / 'DevToolsActivePort', None

    def __enter__(self):
        from websockets.sync.client import connect

        self._poll(self._port_file.is_file)
        port = self._port_file.read_text().split()[0]
        with urllib.request.urlopen(f'http://127.0.0.1:{port}/json') as answer:
            pages = [target for target in json.load(answer) if target['type'] == 'page']
        address = pages[0]['webSocketDebuggerUrl']
        self._connection = connect(address, max_size=None, origin=f'http://127.0.0.1:{port}')
        return self

    def __exit__(self, *_):
        if self._connection is not None:
            self._connection.close()
        self._process.kill()
        self._process.wait()

    def picture(self):
        """The page as it looks now, [H, W, 3] int."""
        self._connection.send(json.dumps({'id': 1, 'method': 'Page.captureScreenshot'}))
        while 'result' not in (answer := json.loads(self._connection.recv(DEADLINE_S))):
            pass
        picture = Image.open(io.BytesIO(base64.b64decode(answer['result']['data'])))
        return np.asarray(picture.convert('RGB')).astype(int)

    def wait_for(self, condition):
        """Take pictures until one fulfils a condition; return it."""
        pictures = [None]

        def fulfilled():
            pictures[0] = self.picture()
            return condition(pictures[0])

        self._poll(fulfilled)
        return pictures[0]

    def _poll(self, condition):
        while not condition():
            assert time.monotonic() < self._end, f'not within {DEADLINE_S} s: {condition}'
            assert self._process.poll() is None, 'the browser has ended'
            time.sleep(0.1)
