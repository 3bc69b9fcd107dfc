#!/bin/sh
# start.sh SERVER.PROPERTIES: run one node as broker and controller, and format an empty log.dirs.
set -eu
settings=$1
set -- /opt/java/bin/java -Xms256m -Xmx256m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 \
  -XX:+ExitOnOutOfMemoryError -Xlog:disable -Xlog:all=error --sun-misc-unsafe-memory-access=allow \
  -Dlog4j2.configurationFile=/opt/log4j2.properties -cp '/opt/kafka/*'
logs=$(sed -n 's/^log\.dirs=//p' "$settings")
if [ ! -e "$logs/meta.properties" ]; then
  id=$(head -c 16 /dev/urandom | base64 | tr '+/' '-_' | cut -c1-22)
  "$@" kafka.tools.StorageTool format --cluster-id "$id" --config "$settings"
fi
exec "$@" kafka.Kafka "$settings"
