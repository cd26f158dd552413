"""What every test of the repository starts from."""

import signal

# A shell starts background jobs with SIGINT ignored, nohup ignores SIGHUP, and children inherit
# both; tests that send these to a process mean one started in the foreground.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)
