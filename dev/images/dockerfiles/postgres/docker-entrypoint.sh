#!/bin/sh
# The part of the real image's entrypoint that k8s/postgres needs: the first start creates the database.
set -eu
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  printf '%s\n' "$POSTGRES_PASSWORD" >/tmp/password
  initdb --username="$POSTGRES_USER" --encoding=UTF8 --pwfile=/tmp/password --auth-local=trust \
    --auth-host=scram-sha-256 >/dev/null
  rm /tmp/password
  pg_ctl --wait --options="-c listen_addresses=''" start >/dev/null
  createdb --username="$POSTGRES_USER" --maintenance-db=postgres "$POSTGRES_DB"
  pg_ctl --wait stop >/dev/null
  echo 'host all all all scram-sha-256' >>"$PGDATA/pg_hba.conf"
fi
exec "$@" -c listen_addresses='*'
