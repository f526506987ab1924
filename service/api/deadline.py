"""A request has one deadline, whatever stages it has: past it the work is dropped, and the answer says what to do."""

import asyncio
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.auth import scope_of
from service.api.middleware import OfRequests
from service.api.problems import respond
from service.errors import DeadlineExceeded
from service.runtime.deadline import ADVICE, within

_ADVICE: Mapping[str, str] = {
    "/classify": "store many labels once, as a label set (PUT /label-sets/{name}), and name it as label_set; or send "
    "fewer inputs, labels or templates",
    "/search": "send fewer parts of a query, and ask for smaller pools and without `exact`",
    "/search/script": "send fewer steps, or fewer parts of them",
    "/search/batch": "send fewer queries, or fewer parts of them, and ask for smaller pools and without `exact`",
}


class Deadline(OfRequests):
    """Answers 504 to a request that stores nothing and is not being answered after so many seconds from the end of
    its body. A request that stores something is dropped only by its own stages: half of it may be stored already."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        super().__init__(app)
        self.seconds = seconds

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope_of(scope["method"], scope["path"]) not in (None, "read"):
            await self.app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        try:
            async with within(None, _ADVICE.get(scope["path"], ADVICE)) as clock:
                is_running = scope["method"] != "POST"
                if is_running:
                    clock.reschedule(loop.time() + self.seconds)

                async def receiving() -> Message:
                    nonlocal is_running
                    message = await receive()
                    if not is_running and message["type"] == "http.request" and not message.get("more_body", False):
                        is_running = True
                        clock.reschedule(loop.time() + self.seconds)
                    return message

                async def sending(message: Message) -> None:
                    nonlocal is_running
                    is_running = True
                    try:
                        clock.reschedule(None)
                    except RuntimeError:  # it is over, and this task is about to be told: nothing is sent before
                        await asyncio.sleep(0)
                    await send(message)

                await self.app(scope, receiving, sending)
        except DeadlineExceeded as late:
            await respond(scope["path"], late)(scope, receive, send)
