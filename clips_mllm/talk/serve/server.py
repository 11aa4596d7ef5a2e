"""uvicorn with an engine behind it: at a stop, answers get their time to be completed, and then are ended in words."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from clips_mllm.talk.engine import Engine


class Server(uvicorn.Server):
    """Gives running answers `patience` seconds when it is stopped; a second signal ends them at once."""

    def __init__(self, config: uvicorn.Config, engine: Engine, patience: float) -> None:
        super().__init__(config)
        self.engine = engine
        self.patience = patience

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and come back when the last answer has been sent."""
        closing = asyncio.create_task(asyncio.to_thread(self.engine.close, self.patience))
        await super().shutdown(sockets)
        self.engine.close()
        await closing
