"""Tokenizing in a second process, for large files. Python runs one thread of a process at a time, so a thread would not
help. Starting the process takes a moment. It imports no torch.

The second process ends with the first, even if the first is killed: its connection is closed then.
"""

import contextlib
import multiprocessing
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from tokenizers import Tokenizer

from minift.data.words import TextTokenizer
from minift.errors import UserError

ROOT = Path(__file__).resolve().parents[2]  # of the package minift


# ---- two ways to tokenize, with the same methods
#
# send(rows of texts) begins the work, receive() returns the tokens (as TextTokenizer.tokenize_rows; raises UserError).
# Each send is followed by one receive. close() at the end, or after an error.


class SameProcess:
    def __init__(self, tokenizer: Tokenizer, control_tokens: str):
        self.tokenizer = TextTokenizer(tokenizer, control_tokens)

    def send(self, rows: list[list[str]]) -> None:
        self.rows = rows

    def receive(self) -> list[list[bytes]]:
        return self.tokenizer.tokenize_rows(self.rows)

    def close(self) -> None:
        pass


class OtherProcess:
    """Between `send` and `receive` this process can do something else."""

    def __init__(self, tokenizer: Tokenizer, control_tokens: str):
        self.connection, other_end = multiprocessing.Pipe()
        with other_end:
            handle = other_end.fileno()
            command = [sys.executable, "-m", __name__, str(handle)]
            try:
                # start_new_session: Ctrl-C reaches this process alone, which then ends the other one
                self.process = subprocess.Popen(command, cwd=ROOT, pass_fds=[handle], stdin=subprocess.DEVNULL,
                                                start_new_session=True)
            except OSError as error:
                raise UserError(f"no process can be started to tokenize the rows: {error.strerror}") from None
        self.send((tokenizer, control_tokens))

    def send(self, rows: object) -> None:
        try:
            self.connection.send(rows)
        except OSError:
            raise self._ended() from None

    def receive(self) -> list[list[bytes]]:
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _ended(self) -> UserError:
        self.connection.close()  # if the process still runs, it ends on this
        code = self.process.wait()
        if code == -signal.SIGKILL:
            cause = "by signal 9: the system does so when memory runs out, close other programs or use --rows"
        elif code < 0:
            cause = f"by signal {-code} ({signal.strsignal(-code)}): start again"
        else:
            cause = f"with exit code {code}, see above"
        return UserError(f"the process that tokenizes the rows was ended {cause}")

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


AnyTokenizer = SameProcess | OtherProcess


def answer_all(connection: Connection) -> None:
    """Tokenize all that the first process sends."""
    tokenizer = TextTokenizer(*connection.recv())
    while True:
        rows = connection.recv()
        try:
            answer = tokenizer.tokenize_rows(rows)
        except (UserError, MemoryError, OSError) as error:
            answer = error
        connection.send(answer)


if __name__ == "__main__":
    with contextlib.suppress(EOFError, OSError):  # the first process has ended
        answer_all(Connection(int(sys.argv[1])))
