"""What every test of the repository starts from."""

import signal

# A shell starts background jobs with SIGINT ignored, and children inherit that; tests that
# interrupt a process mean one started in the foreground.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
