"""The engine as a process of its own, which is started again when it dies and when it hangs."""

from __future__ import annotations

import asyncio
import logging
import socket

import msgspec
from shoplm.engine.client import STOP_SECONDS, EngineClient
from shoplm.engine.launch import PROGRAM, EngineProcess
from shoplm.engine.spec import EngineSpec
from shoplm.errors import BundleChangedError, EngineUnavailableError, ShopLMError, TransientError

_FIRST_BACKOFF_SECONDS, _LAST_BACKOFF_SECONDS = 0.1, 10.0
_LOOKS = 10  # for a sign of life, in the time that an engine may be silent
_TIMES_FIRST_LOAD = 10.0  # that a later one may take
_LONG_LOAD_SECONDS = 60.0  # after each of which it is said that an engine is still loading

log = logging.getLogger("shoplm.engine")


class ProcessEngineClient(EngineClient):
    """The engine in a process of its own, started again with a growing pause when it dies or is killed for hanging,
    and no more once the bundle on disk is another one than the server has read."""

    program: tuple[str, ...] = PROGRAM

    def __init__(
        self,
        spec: EngineSpec,
        hang_seconds: float = 0.0,
        started: EngineProcess | None = None,
        shop_texts: asyncio.Future[bytes] | None = None,
    ) -> None:
        """An engine that owes something and says nothing for `hang_seconds` is killed, and one that is started again
        and takes much longer to load than the first did; 0: however long it takes. `started` is the first one's
        process; `shop_texts` what `EngineProcess.send_shop_texts` takes, once it is known."""
        super().__init__(spec)
        self._shop_texts = shop_texts
        self._hang_seconds = hang_seconds
        self._load_seconds = 0.0  # of the first engine
        self._started = started
        self._process: EngineProcess | None = None
        self._sending: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def process_id(self) -> int | None:
        """The engine's process id."""
        return self._process.id if self._process is not None else None

    async def start(self) -> None:
        begun = asyncio.get_running_loop().time()
        await self._launch()
        self._load_seconds = asyncio.get_running_loop().time() - begun
        self._watcher = asyncio.create_task(self._watch())
        self._watcher.add_done_callback(self._watched)

    async def _launch(self) -> None:
        reminders = asyncio.create_task(_log_long_load())
        try:
            await super()._launch()
        finally:
            reminders.cancel()

    def _open_channel(self) -> socket.socket:
        self._process, self._started = self._started or EngineProcess(self.program), None
        return self._process.connection

    async def _start_engine(self) -> None:
        process, link, loaded = self._process, self._link, self._loaded
        assert process is not None and link is not None and loaded is not None
        process.load(msgspec.json.encode(self.spec))
        self._sending = asyncio.create_task(self._send_shop_texts(process))

        async def died() -> None:
            code = await process.wait()
            await link.lost  # what the engine said before it ended comes before that
            if not loaded.done():
                loaded.set_exception(TransientError(f"the engine ended with code {code} while it was loading"))

        self._early_death = asyncio.create_task(died())

    async def _send_shop_texts(self, process: EngineProcess) -> None:
        texts = b""
        if (known := self._shop_texts) is not None:
            await asyncio.wait((known,))
            if not known.cancelled() and known.exception() is None:
                texts = known.result()
        await asyncio.to_thread(process.send_shop_texts, texts)

    @property
    def _is_loading(self) -> bool:
        """The engine has neither said that it is ready nor that it cannot be."""
        return self._loaded is not None and (self._loaded.cancelled() or not self._loaded.done())

    async def _watch(self) -> None:
        pause = _FIRST_BACKOFF_SECONDS
        while True:
            assert self._process is not None
            ended = asyncio.create_task(self._process.wait())
            if not await self._ends(ended):
                log.error(
                    "the engine hangs: it has said nothing for engine_hang_seconds (%g) and is killed",
                    self._hang_seconds,
                )
                self._kill()
            if self._closing:
                return
            # Not only once it has ended: what waits in a device's driver may take its time to die. What else it says
            # is not heard: what it held counts as lost.
            self._disconnect()
            self._fail_calls("the engine was lost")
            self._changed(False)
            log.error("the engine process ended with code %s", await ended)
            while True:
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LAST_BACKOFF_SECONDS)
                try:
                    await self._launch_again()
                except BundleChangedError as error:
                    self._cannot_go_on(error)
                    return
                except (ShopLMError, OSError) as error:
                    log.error("the engine does not start: %s", error)
                    continue
                break
            pause = _FIRST_BACKOFF_SECONDS
            self._changed(True)

    def _watched(self, watcher: asyncio.Task[None]) -> None:
        """Nobody watches the engine any more; where an error of the watcher's own is why, none takes its place."""
        if watcher.cancelled() or (error := watcher.exception()) is None:
            return
        log.error("the engine is watched no more", exc_info=error)
        self._cannot_go_on(TransientError(f"watching the engine failed: {type(error).__name__}: {error}"))

    def _cannot_go_on(self, error: TransientError) -> None:
        for callback in self._end_callbacks:
            callback(error)

    async def _launch_again(self) -> None:
        """Like `_launch`. Raises EngineUnavailableError, the engine killed, where it takes too long to load."""
        limit = max(self._hang_seconds, _TIMES_FIRST_LOAD * self._load_seconds)
        try:
            async with asyncio.timeout(limit if self._hang_seconds else None):
                await self._launch()
        except TimeoutError:
            self._kill()
            await self._early_death
            raise EngineUnavailableError(
                f"it has not loaded in {limit:.0f} s, the first one did in {self._load_seconds:.0f}, and is killed"
            ) from None

    async def _ends(self, ended: asyncio.Task[int]) -> bool:
        """Wait until the engine has ended (True) or hangs (False)."""
        pause = self._hang_seconds / _LOOKS or None
        while not (await asyncio.wait((ended,), timeout=pause))[0]:
            calls_wait = any(not call.has_ended for call in self._calls.values())
            if self._silence.look(calls_wait=calls_wait) > _LOOKS:  # the first came sooner than a pause after the call
                return False
        return True

    def _kill(self) -> None:
        assert self._process is not None
        self._process.kill()

    async def _stop_engine(self) -> None:
        self._closing = True
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait((self._watcher,))
        if self._sending is not None:
            self._sending.cancel()
        if self._process is None:
            return
        if self._is_loading:  # it has nothing to finish, and reads no message before it has loaded
            self._kill()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._process.wait()
        except TimeoutError:
            log.warning("the engine did not stop in %s s and is killed", STOP_SECONDS)
            self._kill()
            await self._process.wait()
        await self._early_death


async def _log_long_load() -> None:
    """Log each minute that the engine is still loading: the first load may take as long as it needs."""
    begun = asyncio.get_running_loop().time()
    while True:
        await asyncio.sleep(_LONG_LOAD_SECONDS)
        log.warning("the engine has been loading for %.0f s", asyncio.get_running_loop().time() - begun)
