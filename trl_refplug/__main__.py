"""`python -m trl_refplug` is the command `trl-refplug`."""

from trl_refplug.cli.main import main


if __name__ == "__main__":
    main()
