$ErrorActionPreference = 'Stop'
$ProgressPreference = 'SilentlyContinue'
$text = [Text.Encoding]::UTF8.GetString([Convert]::FromBase64String([Console]::In.ReadLine()))
& ([ScriptBlock]::Create($text))
