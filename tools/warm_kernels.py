"""Kernels that start at once: a process that has imported the slow packages forks one for each notebook.

Importing torch, open_clip and transformers takes seconds, and so does looking up what is shipped and drawing the
pictures that name a set of Tinyworld; a book has many notebooks. `warm_kernels()` starts the process and yields the
name of a Jupyter kernel that it forks (on Linux; elsewhere the name of the usual kernel). The process computes no more
than that, in one thread, so that what it forks is as good as new.
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from select import select
from tempfile import TemporaryDirectory
from threading import Thread

IMPORTS = (
    *("ipykernel.kernelapp", "matplotlib_inline.backend_inline", "pandas", "pyarrow.parquet", "seaborn"),
    *("robustclip.attacks", "robustclip.audit", "robustclip.report", "robustclip.study", "robustclip.training"),
    *("open_clip", "transformers.models.bert.modeling_bert", "transformers.models.bert.tokenization_bert_fast"),
)


def serve(listener: socket.socket, parent: int) -> None:
    """Import what notebooks import, then fork a kernel for everyone who connects, while the parent process lives."""
    for name in IMPORTS:
        with suppress(Exception):  # the notebook that needs the module will say what is wrong
            import_module(name)
    torch = import_module("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork has no threads but this one
    with suppress(Exception):  # a page that shows shipped results will say what is wrong with them
        study = import_module("robustclip.study")
        for scale in ("quick", "full", "photo"):
            study.reference(scale)  # parses the package and reads what is shipped
        for role in study.scale("full").roles:
            for split in ("test", *["train"] * (study.scale("full").group_of(role) == "source")):
                import_module("robustclip.data.sources").facts(role, split=split)
    torch.set_num_threads(threads)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # kernels that end leave no zombies
    while os.getppid() == parent:
        if not select([listener], [], [], 2)[0]:
            continue
        connection, _ = listener.accept()
        request, descriptors, _, _ = socket.recv_fds(connection, 1_000_000, 2)
        if os.fork() == 0:
            listener.close()
            become_kernel(connection, json.loads(request), descriptors)
        for descriptor in (connection.detach(), *descriptors):
            os.close(descriptor)


def become_kernel(connection: socket.socket, request: dict, descriptors: list[int]) -> None:
    """Turn this fork into a Jupyter kernel that lives as long as the process at the other end of the connection."""
    from ipykernel.kernelapp import IPKernelApp

    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    Thread(target=lambda: connection.recv(1) or os._exit(1), daemon=True).start()
    IPKernelApp.launch_instance(request["arguments"])
    sys.exit()


def ask(address: str, arguments: list[str]) -> None:
    """What Jupyter starts as its kernel: ask for a fork and live as long as it does, and as Jupyter does."""
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # papermill's way to end; the kernel hears of it in a message, too
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(address)
        request = {"arguments": arguments, "environment": dict(os.environ), "folder": str(Path.cwd())}
        socket.send_fds(connection, [json.dumps(request).encode()], [1, 2])
        while os.getppid() == parent and not select([connection], [], [], 2)[0]:
            pass  # nothing comes; the connection ends with the kernel


@contextmanager
def warm_kernels() -> Iterator[str]:
    """The name of a kernel, for papermill in this process and its children, that starts without importing anything."""
    if sys.platform != "linux":
        yield "python3"
        return
    with TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        address = f"{folder}/socket"
        argv = [sys.executable, "-S", __file__, "ask", address, "-f", "{connection_file}"]
        place = Path(folder, "kernels", "warm-python", "kernel.json")
        place.parent.mkdir(parents=True)
        place.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
        listener.bind(address)
        listener.listen(64)  # who connects during the imports waits
        own = {name: value for name, value in os.environ.items() if name != "JPY_PARENT_PID"}
        own["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # matplotlib looks when it is imported
        number = listener.fileno()
        command = [sys.executable, __file__, "serve", str(number), str(os.getpid())]
        server = subprocess.Popen(command, env=own, cwd=folder, pass_fds=[number])
        listener.close()  # now only the server listens: without it, connecting fails at once
        before = os.environ.get("JUPYTER_PATH", "")
        os.environ["JUPYTER_PATH"] = f"{folder}{os.pathsep}{before}"
        try:
            yield "warm-python"
        finally:
            os.environ["JUPYTER_PATH"] = before
            server.terminate()
            server.wait()


if __name__ == "__main__":
    sys.path.pop(0)  # notebooks do not see the folder of this script
    if sys.argv[1] == "ask":
        ask(sys.argv[2], sys.argv[3:])
    else:
        serve(socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]))
