"""`python -m magnetar`, which needs no installation in a checkout."""

from magnetar.launchers.main import main

main()
