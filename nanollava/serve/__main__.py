"""A chat page and an endpoint that OpenAI's clients can use, for one LLaVA (section 5.1).

    python -m nanollava.serve                          # the toy run; open the address it prints
    python -m nanollava.serve --model llava-1.5-7b-hf --port 9000
    NANOLLAVA_API_KEY=... python -m nanollava.serve --host 0.0.0.0    # also for other machines

Clients use http://127.0.0.1:8000/v1 as their base URL. If NANOLLAVA_API_KEY is set, they must send
it. Replies are computed one after the other. Ctrl-C ends the server.
"""

from ..infra.start import start

if __name__ == "__main__":
    start()  # before other imports, which take long

import os
from ipaddress import ip_address

from ..infra.cli import LESS_MEMORY, Parser, in_range, one_line_errors
from ..infra.http import read_api_key
from ..infra.io import InputError
from ..infra.progress import print0
from ..settings import add_llava_flags, find_toy_model

KEY = "NANOLLAVA_API_KEY"


def parse_arguments():
    parser = Parser(__doc__, prog="python -m nanollava.serve")
    add = parser.add_argument
    add_llava_flags(add, help="folder of a LLaVA (default: runs/toy/stage2)")
    add("--host", default="127.0.0.1",
        help="address to listen at; 0.0.0.0 also accepts other machines and needs a key in "
        f"{KEY} (default: %(default)s, this machine alone)")
    add("--port", type=in_range(0, 65535), default=8000,
        help="0 takes a free one (default: %(default)s)")
    add("--cache-gib", type=in_range(0.0, 1e6), default=2.0,
        help="memory for the conversations that are kept (default: %(default)s)")
    add("--max-waiting", type=in_range(0, 100), default=32,
        help="requests that may wait; more are refused (default: %(default)s)")
    add("--compile", action="store_true", help="compile the blocks: faster after some minutes")
    arguments = parser.parse_args()
    try:
        is_local = ip_address(arguments.host.replace("localhost", "127.0.0.1")).is_loopback
    except ValueError:
        raise InputError(f"--host {arguments.host} is not an IP address") from None
    if not is_local and not read_api_key(KEY):
        raise InputError(f"--host {arguments.host} accepts other machines: set {KEY} to a key that "
                         "their users must send")
    return arguments


if __name__ == "__main__":  # before torch is imported, which takes seconds
    with one_line_errors():
        arguments = parse_arguments()

from PIL import Image

from ..chat import open_llava
from ..infra.device import compile_blocks
from .replies import Replies
from .server import Server


def main(arguments) -> None:
    Image.MAX_IMAGE_PIXELS = 2**25  # Pillow refuses images of more than twice as many
    folder = arguments.model or find_toy_model()
    model, tokenizer = open_llava(folder, arguments.dtype, arguments.device,
                                  arguments.vision_tower, arguments.quantize)
    if arguments.compile:
        compile_blocks(model)
    replies = Replies(model, tokenizer, folder.resolve().name, int(arguments.cache_gib * 2**30))
    address = arguments.host.replace("localhost", "127.0.0.1"), arguments.port
    try:
        server = Server(address, replies, read_api_key(KEY), arguments.max_waiting)
    except OSError as error:
        raise InputError(f"cannot listen at {arguments.host} port {arguments.port}: "
                         f"{error.strerror}; choose another --port") from error
    host, port = server.server_address[:2]
    host = f"[{host}]" if ":" in host else host
    print0(f"conversations are kept in {arguments.cache_gib:g} GiB: "
           f"{replies.cache.max_tokens():,} tokens")
    print(f"http://{host}:{port}", flush=True)
    try:
        server.serve_forever()
    finally:
        server.close()


if __name__ == "__main__":
    try:
        with one_line_errors(LESS_MEMORY):
            main(arguments)
    except SystemExit as exit:  # a normal exit aborts while a reply is computed
        os._exit(exit.code)
