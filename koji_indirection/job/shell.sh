#!/bin/sh
# A shell on the terminal of whoever has asked for one, with the environment that commands have.
# Arguments: the shell, and the exit status of the set-up.

. /etc/koji-indirection/settings
exec <"$SHELL_TTY" >"$SHELL_TTY" 2>&1
stty sane $TERMINAL_SIZE 2>/dev/null

[ "$2" -eq 0 ] || echo "=== the set-up has failed, see above"
echo "=== the commands, none of which has been run:"
for head in /etc/koji-indirection/commands/*.head; do
    name=$(sed -n 's/^=== command [0-9]* of [0-9]*: //p' "$head")
    echo "${head%.head}.cmd    $name"
done
echo "=== exit powers the guest off, Ctrl-] ends it at once; nothing of it is kept"

TERM=$TERMINAL_TYPE PS1='indirection# '
export TERM PS1
set -- "$1" -i
# What an init script has put into the background ignores Ctrl-C, and so would all that the shell
# starts: no shell can change that.
if env --default-signal=INT,QUIT true 2>/dev/null; then
    exec env --default-signal=INT,QUIT "$@"
elif command -v perl >/dev/null; then
    exec perl -e '$SIG{INT} = $SIG{QUIT} = "DEFAULT"; exec @ARGV' "$@"
fi
exec "$@"
