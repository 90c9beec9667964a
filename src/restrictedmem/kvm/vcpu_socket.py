"""A vCPU's socket in the engine process: what its owner says to it, and the thread that listens."""

from collections import Counter
from errno import EINVAL, EPERM, EPROTO
from typing import final

from restrictedmem.abi import kvm
from restrictedmem.kvm import exits, wire
from restrictedmem.kvm.serving import serve_one
from restrictedmem.kvm.vcpu import Vcpu
from restrictedmem.service.wire import Channel, Message


@final
class VcpuSocket:
    """A vCPU and the thread that serves its socket: registers before the first run, then runs."""

    def __init__(self, vcpu: Vcpu, owner: Channel) -> None:
        self.vcpu = vcpu
        self._owner = owner
        self.started = False
        self.exits: Counter[str] = Counter()

    def fileno(self) -> int:
        """Return the descriptor of the vCPU's socket."""
        return self._owner.fileno()

    def serve(self) -> None:
        """Serve the vCPU's socket until the owner closes it."""
        while serve_one(self._owner, self._dispatch):
            pass

    def _dispatch(self, message: Message) -> None:
        match message.number:
            case wire.RUN.number:
                (value,) = message.unpack(wire.COMPLETION)
                self._owner.reply(exits.pack(self._run(value)))
            case wire.SET_REGS.number:
                if self.started:
                    raise OSError(EPERM, "the guest has run: its registers are its own")
                self._set_regs(kvm.kvm_regs.from_buffer_copy(message.body))
                self._owner.reply()
            case _:
                raise OSError(EPROTO, f"no such call: {message.number:#x}")

    def _set_regs(self, regs: kvm.kvm_regs) -> None:
        rest = kvm.kvm_regs(rip=regs.rip, rsp=regs.rsp, rdi=regs.rdi, rsi=regs.rsi)
        if bytes(rest) != bytes(regs):
            raise OSError(EINVAL, "only rip, rsp, rdi and rsi can be set")
        self.vcpu.engine.set_regs(regs)

    def _run(self, value: int) -> exits.Exit:
        if self.started:
            self.vcpu.engine.complete(value)
        self.started = True
        exit_ = self.vcpu.run()
        self.exits[type(exit_).__name__] += 1
        return exit_
